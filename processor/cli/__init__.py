"""The command line `embedding-processor`."""

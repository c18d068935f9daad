"""Stand-in until the command line lands (helper H6 replaces this file)."""
import sys
from processor.app import run_aggregator, run_worker
from processor.settings import load

def main() -> int:
    args = sys.argv[1:]
    over = {"lane": args[args.index("--lane") + 1]} if "--lane" in args else {}
    return {"worker": run_worker, "aggregator": run_aggregator}[args[0]](load(**over))

if __name__ == "__main__":
    sys.exit(main())

"""The fold of document manifests: what a document's newest manifest no longer names is deleted from the sink view.

**Why the newest first.** A tombstone that is written again after its chunk has come back deletes a live vector.
So a backlog (a restart, a standby that takes over with an old store, a rebuild from nothing) is first folded to
its end: what a later manifest drops is only remembered as stale, and what a still later one names again is
forgotten. Only at the end of the backlog are tombstones written, for what is absent from the newest manifest.

**Why the topic still holds what a rebuild needs.** `embedding-documents` is compacted. The cleaner drops a
manifest only if a newer one of its key lies in the part of the log that may be cleaned, and
`min.compaction.lag.ms` (7 days) keeps every younger record out of that part. So as long as the newer manifest is
younger than 7 days, the one before it is still there, and their difference can be computed, even with the store
lost. Differences older than that were acted on, unless the aggregator was behind by 7 days: what had been
committed to the group is not acted on again, since tombstones are acknowledged before the offset is committed.
"""

from __future__ import annotations

from uuid import UUID

from processor import identity
from processor.accounts import DocumentKey, DocumentVectors
from processor.domain import DocumentManifest, Tombstone

UNKNOWN = DocumentVectors("", frozenset())


def document_key(manifest: DocumentManifest) -> DocumentKey:
    return DocumentKey(manifest.tenant_id, manifest.collection, manifest.document_id)


def vector_ids(manifest: DocumentManifest) -> frozenset[bytes]:
    """Every vector that the manifest names: its chunk ids x its vector spaces, as the 16 bytes of their ids."""
    return frozenset(
        UUID(identity.vector_id(manifest.tenant_id, manifest.collection, manifest.document_id, chunk_id, space)).bytes
        for space in manifest.vector_spaces
        for chunk_id in manifest.chunk_ids
    )


def fold_manifest(before: DocumentVectors, manifest: DocumentManifest, *, acted_on: bool = False) -> DocumentVectors:
    """The document once the manifest is taken; one that is not newer by `source_version` changes nothing.

    `acted_on`: the tombstones of this manifest were acknowledged in an earlier life of the store.
    """
    if manifest.source_version <= before.source_version:
        return before
    live = vector_ids(manifest)
    stale = before.stale if acted_on else before.stale | before.live
    return DocumentVectors(manifest.source_version, live, stale - live)


def tombstones(document: DocumentVectors) -> list[Tombstone]:
    """The deletes that are due, in a fixed order."""
    return [Tombstone(str(UUID(bytes=raw)), document.source_version) for raw in sorted(document.stale)]


def deleted(document: DocumentVectors) -> DocumentVectors:
    """The document once its tombstones are acknowledged."""
    return DocumentVectors(document.source_version, document.live)

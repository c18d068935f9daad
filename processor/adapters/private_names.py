"""Every name of faust and aiokafka that we rely on and that they never promised: what an upgrade may change under us.

tests/contract/test_faust_private_names.py holds this list to the code and to the installed versions, and the ADR
(docs/adr/0001-faust.md) to this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Relied(NamedTuple):
    """Names of one module or class, and what of ours to look at when one of them is gone or means something else."""

    names: tuple[str, ...]
    look_at: str


PRIVATE_NAMES: Mapping[str, Relied] = {
    "faust.app.base:App": Relied(
        ("_consumer", "_crash", "_create_directories", "_new_producer_transport", "_new_transport"),
        "engine.App: our transport is put in, a crash of any service is told; without it a dead engine looks alive",
    ),
    "faust.serializers.schemas": Relied(("Schema",), "engine.PassThrough: its base"),
    "faust.serializers.schemas:Schema": Relied(("compile",), "engine.PassThrough: runs pass undecoded"),
    "faust.streams": Relied(("_CStreamIterator",), "extensions.loaded"),
    "faust.transport": Relied(("conductor",), "extensions.loaded"),
    "faust.transport.conductor": Relied(("ConductorHandler",), "extensions.loaded"),
    "faust.transport.consumer:Consumer": Relied(
        (
            "_drain_messages",
            "force_commit",
            "perform_seek",
            "resume_flow",
            "stop_flow",
            "verify_all_partitions_active",
            "wait_empty",
        ),
        "consumer.Consumer: the reading loop, the commit and the giving up that replace Faust's. One that Faust no "
        "longer calls means records that are not read, not committed, or given up too late",
    ),
    "faust.transport.drivers.aiokafka:AIOKafkaConsumerThread": Relied(
        ("_create_worker_consumer", "_ensure_consumer"), "thread.ConsumerThread: a consumer of our options"
    ),
    "faust.transport.drivers.aiokafka:Consumer": Relied(
        ("RebalanceListener", "_new_consumer_thread", "_thread"), "consumer.Consumer: its thread and listener are ours"
    ),
    "faust.transport.drivers.aiokafka:ConsumerRebalanceListener": Relied(("_thread",), "thread.Listener"),
    "faust.transport.drivers.aiokafka:Producer": Relied(
        ("_new_producer", "_producer", "flush"), "consumer.Producer and Engine.producer: idempotent, acks=all"
    ),
    "aiokafka:AIOKafkaConsumer": Relied(
        ("_client", "_coordinator", "_fetcher", "_group_instance_id", "_subscription"),
        "thread: the way to what is below; budget_feed",
    ),
    "aiokafka:AIOKafkaProducer": Relied(("client",), "outbox: who leads a partition; kafka.unhurried"),
    "aiokafka.client": Relied(("ConnectionGroup",), "thread.leave_a_join"),
    "aiokafka.client:AIOKafkaClient": Relied(
        ("_conns", "add_topic", "cluster", "force_metadata_update"),
        "thread.leave_a_join: what waits for the group is ended; outbox: who leads a partition; kafka.unhurried: how "
        "often it is asked",
    ),
    "aiokafka.cluster": Relied(
        ("ClusterMetadata",), "assignor.SingleOwnerAssignor, thread.ConsumerThread, budget_feed"
    ),
    "aiokafka.cluster:ClusterMetadata": Relied(
        ("add_listener", "leader_for_partition", "partitions_for_topic", "topics"),
        "outbox: one request in flight a broker; thread.ConsumerThread and budget_feed: a topic that was deleted",
    ),
    "aiokafka.consumer": Relied(("fetcher",), "tolerant: where the parser is exchanged"),
    "aiokafka.consumer.fetcher": Relied(("MemoryRecords",), "tolerant.read_any_header_name"),
    "aiokafka.consumer.fetcher:Fetcher": Relied(("error_future",), "thread.ConsumerThread.check"),
    "aiokafka.consumer.group_coordinator:GroupCoordinator": Relied(
        (
            "_closing",
            "_coordination_task",
            "_send_req",
            "check_errors",
            "coordinator_id",
            "fetch_committed_offsets",
            "generation",
            "group_id",
            "member_id",
            "request_rejoin",
            "reset_generation",
        ),
        "thread.watch (what renews the session: without it no lease is ever held), thread.offsets_of, commits by "
        "generation, thread.leave_a_join (a stop that waits for nobody)",
    ),
    "aiokafka.consumer.subscription_state:Assignment": Relied(("state_value",), "thread.at_end"),
    "aiokafka.consumer.subscription_state:Subscription": Relied(("assignment",), "thread.at_end"),
    "aiokafka.consumer.subscription_state:SubscriptionState": Relied(
        ("reassignment_in_progress", "subscription"), "thread.ConsumerThread: no seek in the midst of a rebalance"
    ),
    "aiokafka.consumer.subscription_state:TopicPartitionState": Relied(
        ("has_valid_position", "position"), "thread.at_end"
    ),
    "aiokafka.coordinator.assignors.abstract": Relied(
        ("AbstractPartitionAssignor",), "assignor.SingleOwnerAssignor: its base"
    ),
    "aiokafka.coordinator.assignors.roundrobin": Relied(("RoundRobinPartitionAssignor",), "Engine.new_consumer"),
    "aiokafka.coordinator.protocol": Relied(
        ("ConsumerProtocolMemberAssignment", "ConsumerProtocolMemberMetadata"), "assignor.SingleOwnerAssignor"
    ),
    "aiokafka.producer.message_accumulator": Relied(("BatchBuilder",), "outbox: batches of our own"),
    "aiokafka.protocol.commit": Relied(("OffsetCommitRequest",), "thread.watch: who else commits under our name"),
    "aiokafka.protocol.group": Relied(
        ("HeartbeatRequest", "LeaveGroupRequest", "SyncGroupRequest"),
        "thread.watch: which requests renew the session; thread.leave_a_join",
    ),
    "aiokafka.record": Relied(("default_records", "memory_records", "util"), "extensions.loaded"),
    "aiokafka.record.default_records": Relied(
        ("DefaultRecordBatch", "DefaultRecordBatchBuilder", "_DefaultRecordBatchPy"),
        "outbox: sizes before sending; extensions.loaded; tolerant",
    ),
    "aiokafka.record.default_records:_DefaultRecordBatchPy": Relied(("_buffer", "_read_msg"), "tolerant: the parser"),
    "aiokafka.record.memory_records": Relied(("MemoryRecords", "_MemoryRecordsPy"), "extensions.loaded, tolerant"),
    "aiokafka.record.memory_records:_MemoryRecordsPy": Relied(
        ("MAGIC_OFFSET", "_next_slice", "next_batch"), "tolerant: which parser gets a batch"
    ),
    "aiokafka.record.util": Relied(("calc_crc32c", "calc_crc32c_py"), "extensions.loaded"),
}

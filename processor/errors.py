"""What can go wrong outside of a request's own content. Bad input is a value (`domain.Fault`), never one of these.

ProcessorError
|- SettingsError            a setting is missing, malformed or contradicts another: fix it and start again
|- TopicsError              a topic is missing or would break a law: run `topics create` or fix the broker
|- LeaseLost                the partition belongs to somebody else now: drop the work, it will be delivered again
|- StoreTaken               so does the aggregator's store
|- DeliveryFailed           the broker did not acknowledge in time: exit, be restarted, replay
|- RecordTooLarge           a message of ours is over max_record_bytes: a bug of the step that made it
|- CacheUnavailable         L2 did not answer in its budget: go without it
|- QuotaUnavailable         the shared quota did not answer in its budget: keep to a configured part of the limits
|- RegistryUnavailable      the schema registry did not answer: retry, nothing is lost
|- RequestRefused           the client refuses what it was given: fix the named field; nothing was sent
|- EmbeddedUnavailable      an embedded server is not installed or did not start: see the message
|- StoreError               the aggregator's local store is unusable or belongs to another topic: see the message
`- ProviderError            one provider call failed; the subclass says what to do
   |- ProviderTransient     no answer, 5xx, broken body: try again with a new attempt
   |- ProviderThrottled     429 with a wait: try again after `retry_after_s`
   |- ProviderPaused        auth or quota: pause the stream, keep the lag, health says why
   |- CallTooLarge          the composition of the call is at fault (size, timeout, memory): make it smaller
   |- InputRejected         one of the texts is at fault: search for it
   `- ModelRejected         the model is at fault: error results for its chunks
"""

from __future__ import annotations

from typing import NamedTuple


class ProcessorError(Exception):
    """Base of all errors of this package. Messages carry ids and codes, never a text, a vector or a secret."""


class SettingsError(ProcessorError):
    """Fix the named settings and start again; all faults are reported together."""


class TopicsError(ProcessorError):
    """A topic is missing or its configuration would break a law; the message names the topic and the command."""


class LeaseLost(ProcessorError):
    """The partition's lease is over. The work is dropped here and delivered again to its new owner."""


class StoreTaken(ProcessorError):
    """Another process has claimed the aggregator's store: whatever is folded here can't be saved any more."""


class DeliveryFailed(ProcessorError):
    """The broker did not acknowledge a record in time or refused it. The process ends and its work is replayed."""


class RecordTooLarge(ProcessorError):
    """A message of ours is larger than what may be produced. Nothing was sent; the step that made it is at fault."""


class BrokerUnavailable(ProcessorError):
    """The brokers did not answer as they should; the message names the settings. Starting again is safe.

    `may_pass`: to ask again later may help.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class CacheUnavailable(ProcessorError):
    """The shared cache did not answer within its budget. Steps go without it; check Redis."""


class QuotaUnavailable(ProcessorError):
    """The shared quota did not answer within its budget. Each worker keeps to its part of the limits; check Redis."""


class RegistryUnavailable(ProcessorError):
    """The schema registry did not answer. Nothing is lost; check the registry's address and health."""


class RequestRefused(ProcessorError):
    """The client refuses what it was given; the message names the field and the fix. Nothing was sent."""


class EmbeddedUnavailable(ProcessorError):
    """An embedded server is not installed or did not start; the message names the extra or quotes its output."""


class StoreError(ProcessorError):
    """The aggregator's local store can't be used as it is; the message says whether to delete or to rebuild it."""


class RateLimits(NamedTuple):
    """What the headers of an answer, refused or not, say of the account. None: not said.

    Limits are per minute; `remaining_*` is what is left now.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    remaining_requests: float | None = None
    remaining_tokens: float | None = None


class ProviderError(ProcessorError):
    """One provider call failed.

    `http_status` is set when the provider answered (then a `failed` receipt with a bill of 0 is due); None: no
    answer arrived and whether it was billed is unknown. `code` is a word of ours, never the provider's text.
    """

    def __init__(self, code: str, *, http_status: int | None = None) -> None:
        super().__init__(f"{code} (HTTP {http_status})" if http_status else code)
        self.code = code
        self.http_status = http_status
        self.limits: RateLimits | None = None


class ProviderTransient(ProviderError):
    """The call may succeed if it is made again."""


class ProviderThrottled(ProviderError):
    """The provider asks to wait. `retry_after_s` is None when it did not say for how long."""

    def __init__(self, code: str, *, http_status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(code, http_status=http_status)
        self.retry_after_s = retry_after_s


class ProviderPaused(ProviderError):
    """Key or quota: check the account. The stream is paused and loses nothing."""


class CallTooLarge(ProviderError):
    """The call as a whole is too much for the provider (size, time, memory); smaller calls may pass."""


class InputRejected(ProviderError):
    """One of the call's texts is refused for good."""


class ModelRejected(ProviderError):
    """The provider does not serve this model or these parameters."""

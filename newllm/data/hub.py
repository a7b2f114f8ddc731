"""The Hugging Face hub as something that may be away: quick probe, retries, and a reason fit for a sentence."""

import os
import re
import time
from urllib.parse import quote

PROBE_SECONDS = 3.0
INTERRUPTED = {  # a connection that stood and broke, under the names of httpx, requests, aiohttp and http.client
    "RemoteProtocolError",
    "ReadError",
    "IncompleteRead",
    "ChunkedEncodingError",
    "ServerDisconnectedError",
    "ClientPayloadError",
    "ConnectionResetError",
    "ConnectionAbortedError",
}
REFUSED = {  # answers of the hub, by the names in huggingface_hub; a gated repository is also one "not found"
    "GatedRepoError": "it is gated: accept its terms on its page there and log in by `hf auth login`",
    "RepositoryNotFoundError": "it has none of this name, or a private one: `hf auth login` if it is yours",
    "RevisionNotFoundError": "it has no such revision",
}


class Unreachable(Exception):
    """The hub cannot give what was asked now; the message is the reason, without a full stop."""


def retry(function, attempts=4, wait=1.0, sleep=time.sleep):
    """`function()`, again after `wait`, 2 `wait`, 4 `wait` ... seconds while it fails with a transient error.

    Raises:
        The function's own error, when it is not transient or the attempts are used up.
    """
    for attempt in range(attempts):
        try:
            return function()
        except Exception as error:
            if attempt == attempts - 1 or not is_transient(error):
                raise
            sleep(wait * 2**attempt)


def is_transient(error):
    """Whether trying again may help: HTTP 429 or 5xx, a time-out, an interrupted transfer.

    No name resolution, no route (also a connection not opened in time) and offline mode are answers, not accidents.
    """
    chain = _chain(error)
    names = [kind.__name__ for link in chain for kind in type(link).__mro__]
    if "OfflineModeIsEnabled" in names or "ConnectTimeout" in names:
        return False
    if any(status == 429 or status >= 500 for status in map(_status, chain)):
        return True
    # The hub libraries turn a 429 into FileNotFoundError or RepositoryNotFoundError and leave it in the message only.
    if any(re.search(r"\b429\b|too many requests", str(link), re.IGNORECASE) for link in chain):
        return True
    return any("Timeout" in name or name in INTERRUPTED for name in names)


def describe(error):
    """The reason in a few words, without a full stop."""
    chain = _chain(error)
    names = [kind.__name__ for link in chain for kind in type(link).__mro__]
    text = " ".join(str(link) for link in chain)
    status = next((status for status in map(_status, chain) if status), 0)
    if "OfflineModeIsEnabled" in names:
        return "offline mode is on (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE)"
    if status == 429 or re.search(r"\b429\b|too many requests", text, re.IGNORECASE):
        return "HTTP 429, too many requests"
    if refused := next((reason for name, reason in REFUSED.items() if name in names), ""):
        return refused
    if status:
        return f"HTTP {status}"
    if any("Timeout" in name for name in names):
        return "time-out"
    words = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
    if "gaierror" in names or re.search(
        r"name resolution|name or service not known|getaddrinfo", text, re.IGNORECASE
    ):
        return "no internet connection: name lookup failed"
    return words if len(words) <= 200 else words[:197] + "..."


def probe(path):
    """Ask the hub for `path` (such as "api/datasets/OWNER/NAME") once, before a library with long retries does.

    Returns:
        The hub's description of it, a dict; `sha` is its commit.

    Raises:
        Unreachable: offline mode, no connection within seconds, or an answer that is not the thing.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if constants.HF_HUB_OFFLINE:
        raise Unreachable("offline mode is on (HF_HUB_OFFLINE)")

    def ask():
        url = f"{constants.ENDPOINT}/{path}"
        answer = get_session().get(url, headers=build_hf_headers(), timeout=PROBE_SECONDS)
        hf_raise_for_status(answer)
        return answer.json()

    try:
        return retry(ask)
    except Exception as error:
        raise Unreachable(describe(error)) from error


def load_model(load, source, revision="main", **options):
    """`load(source, ...)` of transformers, which by itself asks a hub that is away for most of a minute.

    Args:
        load: such as AutoModel.from_pretrained. source: a folder, or a name on the hub.

    Raises:
        Unreachable: the hub cannot be asked, and nothing was downloaded before. `load` raises errors of its own.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if os.path.exists(source):
        return load(source, **options)
    try:
        probe(f"api/models/{quote(source)}/revision/{revision}")
    except Unreachable as reason:
        try:
            source = snapshot_download(source, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise reason from None
        return load(source, **options)
    return load(source, revision=revision, **options)


def _chain(error):
    """The error and what caused it, outermost first."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error):
    """HTTP status an exception carries, 0 for none."""
    for holder in (getattr(error, "response", None), error):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if type(value) is int:
                return value
    return 0

"""The Hugging Face hub as something that may be away: a quick probe, retries, a reason fit for a sentence."""

import os
import time
from urllib.parse import quote

from newllm.errors import first_line

PROBE_SECONDS = 3.0
PAUSES = (1.0, 2.0, 4.0, None)  # seconds after an attempt
# By class name: the errors of httpx with huggingface_hub 1 are those of httpx2 with 2.
PASSING = {"ReadTimeout", "TimeoutError", "RemoteProtocolError", "ReadError", "ConnectionResetError"}
REASONS = {
    "OfflineModeIsEnabled": "offline mode is on (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE)",
    "GatedRepoError": "it is gated: accept its terms on its page there and log in by `hf auth login`",
    "RepositoryNotFoundError": "it has none of this name, or a private one: `hf auth login` if it is yours",
    "RevisionNotFoundError": "it has no such revision",
    "ConnectTimeout": "no internet connection",
    "ConnectError": "no internet connection",
    "TimeoutException": "time-out",
}


class Unreachable(Exception):
    """The hub cannot give what was asked now; the message is the reason, without a full stop."""


def describe(error):
    """The reason in a few words, without a full stop."""
    names, status = _causes(error)
    for name, reason in REASONS.items():
        if name in names:
            return reason
    if status:
        return f"HTTP {status}"
    return first_line(error)[:200]


def _causes(error):
    """Class names of an error and what it wraps, and the HTTP status they carry, 0 for none."""
    names, status = set(), 0
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        status = status or getattr(getattr(error, "response", None), "status_code", 0)
        error = error.__cause__ or error.__context__
    return names, status


def probe(path):
    """The hub's description (a dict; `sha`: commit) of `path`, such as "api/datasets/OWNER/NAME".

    Asked again after HTTP 429 or 5xx, or when a connection that stood breaks.

    Raises:
        Unreachable: offline mode, no connection within seconds, or an answer that is not the thing.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if constants.HF_HUB_OFFLINE:
        raise Unreachable(REASONS["OfflineModeIsEnabled"])
    for pause in PAUSES:
        try:
            url = f"{constants.ENDPOINT}/{path}"
            answer = get_session().get(url, headers=build_hf_headers(), timeout=PROBE_SECONDS)
            hf_raise_for_status(answer)
            return answer.json()
        except Exception as error:
            names, status = _causes(error)
            passes = status == 429 or status >= 500 or PASSING & names
            if not passes or pause is None:
                raise Unreachable(describe(error)) from error
        time.sleep(pause)


def load_model(load, source, revision="main", **options):
    """`load(source, ...)` of transformers, which by itself asks a hub that is away for most of a minute.

    Args:
        load: such as AutoModel.from_pretrained. source: a folder, or a name on the hub.

    Raises:
        Unreachable: the hub cannot be asked, and nothing was downloaded before. What `load` raises.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if os.path.exists(source):
        return load(source, **options)
    try:
        probe(f"api/models/{quote(source)}/revision/{revision}")
        return load(source, revision=revision, **options)
    except Unreachable as reason:
        try:
            folder = snapshot_download(source, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise reason from None
        return load(folder, **options)

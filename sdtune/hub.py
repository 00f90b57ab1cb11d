"""The command `sdtune push`: a run to the Hub, with patience for the network, and with words for what it refuses.

    push("runs/my-dog", "ann/my-dog")          # Pushed(url="https://huggingface.co/ann/my-dog", ...)

huggingface_hub sends the requests. It tries again by itself while it uploads, but not while it makes a repository or
commits; so each of these is tried again here. The token is read by huggingface_hub and seen by nobody else.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdtune.errors import HubError, SdtuneError, UsageError
from sdtune.hub_folder import write_hub_folder
from sdtune.run_folder import RunFolder

T = TypeVar("T")
WAITS = (1, 2, 4, 8, 16)  # seconds before each further try
LONGEST_WAIT = 300  # seconds, when the Hub says how long to wait
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")  # all that hf_xet's ConnectionError says of an answer
PATIENCE = (10, 300, 300, 300)  # seconds to connect, read, write, and get a connection


@dataclass(frozen=True)
class Pushed:
    """What went up.

    Attributes:
        url: where it can be seen. folder: what was sent, on this machine.
        files: sizes in bytes by name in the repository.
    """

    url: str
    folder: Path
    files: dict[str, int]


def push(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    license: str | None = None,
) -> Pushed:
    """Write the folder of a model and upload it; what the repository holds besides stays.

    Args:
        run: run folder. repo: user/name; it is made where it does not exist.
        private: nobody else may see it. dry_run: only write the folder.
        out: where to write it; None: push/ in the run folder.
        license: as the Hub calls it, such as openrail++; None takes that of the base, where it is known.

    Raises:
        UsageError: not a run folder or not a name. RunError: the run has not ended.
        HubError: not logged in, not allowed, or the Hub could not be reached after all.
    """
    check_name(repo)
    if not dry_run:
        check_login()
    folder = write_hub_folder(RunFolder(run), repo, out, license)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    pushed = Pushed(address(repo), folder, dict(sorted(files.items())))
    if not dry_run:
        print(f"uploading {len(files)} files, {size(sum(files.values()))}, to {pushed.url}", file=sys.stderr)
        with plain_messages():
            upload(folder, repo, private)
    return pushed


def upload(folder: Path, repo: str, private: bool) -> None:
    """Make the repository if need be, and commit a folder to it. Raises HubError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        trying_again(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
        if private and not trying_again(lambda: api.model_info(repo)).private:
            raise HubError(
                f"{repo} exists already and everybody can see it, but it was to be private; nothing was uploaded. Make "
                f"it private at {address(repo)}/settings, or push to a new name"
            )
        trying_again(lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with sdtune"))
    except SdtuneError:
        raise
    except Exception as fault:  # of huggingface_hub, its HTTP library or hf_xet
        raise HubError(explain(fault, repo)) from fault


def trying_again(act: Callable[[], T]) -> T:
    """The answer of `act`, which is called again after a while when the network or the Hub is at fault."""
    from huggingface_hub import get_session

    for wait in WAITS:
        get_session().timeout = PATIENCE  # by default it waits for ever
        try:
            return act()
        except Exception as fault:
            if not passes(fault):
                raise
            seconds = asked_to_wait(fault) or wait
            print(f"{reason(fault)}; trying again in {seconds} s", file=sys.stderr)
            time.sleep(seconds)
    return act()


# --- what went wrong ------------------------------------------------------------------------------------------------


def status_of(fault: BaseException | None) -> int | None:
    """The HTTP status that a fault, or what it came from, stands for."""
    from huggingface_hub.errors import HfHubHTTPError

    while fault is not None:
        if isinstance(fault, HfHubHTTPError):
            return fault.response.status_code
        told = XET_STATUS.search(str(fault))
        if told and isinstance(fault, ConnectionError):
            return int(told[1])
        fault = fault.__cause__
    return None


def passes(fault: Exception) -> bool:
    """Whether a fault may be gone after a while: no connection, too many requests, the Hub out of order."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(fault)
    if status is not None:
        return status in (408, 429) or status >= 500
    return is_network_fault(fault) and not isinstance(fault, OfflineModeIsEnabled)


def is_network_fault(fault: BaseException | None) -> bool:
    """Whether no proper answer came at all."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever huggingface_hub is built on
    garbled = json.JSONDecodeError  # a proxy's page in place of an answer
    while fault is not None:
        if isinstance(fault, (http_error, ConnectionError, TimeoutError, garbled)):
            return True
        fault = fault.__cause__
    return False


def asked_to_wait(fault: Exception) -> int | None:
    """Seconds that the Hub asks to wait, within reason."""
    response = getattr(fault, "response", None)
    wish = response.headers.get("Retry-After", "") if response is not None else ""
    return min(int(wish), LONGEST_WAIT) if wish.isdigit() else None


def reason(fault: Exception) -> str:
    """A fault that passes, in a few words."""
    status = status_of(fault)
    if status is not None:
        return f"the Hub answers {status}"
    return f"the Hub cannot be reached ({shortened(fault)})"


def explain(fault: Exception, repo: str) -> str:
    """A paragraph for what ended a push."""
    status, owner = status_of(fault), repo.split("/")[0]
    if status == 401:
        return "the Hub does not accept this token: it is wrong, or has expired. Log in anew with: hf auth login"
    if status == 403:
        user = logged_in_as()
        who = f"you are logged in as {user}" if user else "you are logged in with another account"
        if user == owner:
            return f"this token of {user} may only read. Make one that may write, then log in with it: hf auth login"
        mine = f"{user or 'YOUR-NAME'}/{repo.split('/')[1]}"
        return (
            f"you may not write to {repo}: {who}, and '{owner}' is somebody else, or an organisation in which you may "
            f"not. Push to {mine}, or log in as {owner} with: hf auth login"
        )
    if status == 404:
        return f"the Hub has no '{owner}' that a repository could be made for ({repo}); check the name"
    if status in (409, 412):
        return f"{repo} was changed by somebody else during the upload; push once more"
    if passes(fault):
        return f"{reason(fault)}, after {len(WAITS) + 1} tries; push once more when it is back"
    if status is not None:
        return f"the Hub refused the upload to {repo}: {shortened(fault)}"
    return f"the upload to {repo} failed: {shortened(fault)}; push once more, or write the folder alone with --dry-run"


def logged_in_as() -> str:
    """The name behind the token; empty where the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().whoami()["name"])
    except Exception:  # it is only for the words of a message
        return ""


def shortened(fault: Exception) -> str:
    """What a library says, on one line, without the token should a server send it back."""
    from huggingface_hub import get_token

    text = " ".join(str(fault).split()) or type(fault).__name__
    token = get_token()
    return (text.replace(token, "...") if token else text)[:300]


# --- before and around ----------------------------------------------------------------------------------------------


def check_name(repo: str) -> None:
    """Raises UsageError unless it is user/name, as the Hub takes them."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
        fits = repo.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise UsageError(
            f"got '{repo}', expected user/name: letters, digits, '-', '_' and '.', such as ann/my-dog; `hf auth "
            "whoami` says who you are"
        )


def check_login() -> None:
    """Raises HubError when nothing can be sent at all."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it: unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise HubError("you are not logged in to the Hub. Make a token that may write, then: hf auth login")


def address(repo: str) -> str:
    """Where a repository is seen."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def plain_messages() -> Iterator[None]:
    """Within: huggingface_hub's own messages without the signed part of addresses, and bars on a terminal alone."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, shown = logging.getLogger("huggingface_hub.utils._http"), not are_progress_bars_disabled()
    logger.addFilter(without_signature)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logger.removeFilter(without_signature)
        if shown:
            enable_progress_bars()


def without_signature(record: logging.LogRecord) -> bool:
    """Takes what follows a `?` off the addresses in a log message."""
    record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), ()
    return True


def size(count: int) -> str:
    """Bytes in words."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if count >= each[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"


# --- the command ----------------------------------------------------------------------------------------------------


def command(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    license: str | None = None,
    as_json: bool = False,
) -> int:
    """`sdtune push`: see `push`; returns the exit code. With `as_json` it ends with one JSON object on stdout."""
    pushed = push(run, repo, private=private, dry_run=dry_run, out=out, license=license)
    if as_json:
        result: dict[str, Any] = {"url": None if dry_run else pushed.url, "repo": repo, "dry_run": dry_run}
        print(json.dumps(result | {"folder": str(pushed.folder), "files": pushed.files}))
        return 0
    if not dry_run:
        print(pushed.url)
        return 0
    width = max(map(len, pushed.files))
    for name, count in pushed.files.items():
        print(f"{name:<{width}}  {size(count)}")
    private_words = ", private" if private else ""
    print(f"would go to {pushed.url}{private_words}; it stands in {pushed.folder}", file=sys.stderr)
    return 0


def push_after_training(run: Path, repo: str, *, private: bool) -> str:
    """The last act of a training run; returns the address.

    Raises:
        HubError: whatever went wrong, with how to push later: nothing of the training is lost.
    """
    try:
        return push(run, repo, private=private).url
    except Exception as fault:
        what = str(fault).rstrip(".") if isinstance(fault, SdtuneError) else shortened(fault)
        again = f"sdtune push {run} {repo}{' --private' if private else ''}"
        raise HubError(
            f"the training is done and its weights are in {run / 'final'}, but they were not pushed: {what}. Push them "
            f"with: {again}"
        ) from fault

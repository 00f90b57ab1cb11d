"""`sdtune caption`: a folder of pictures in, captions out, with no work lost whenever it is stopped.

Each process takes its share of the pictures. Threads decode them ahead of the model, and a finished batch goes to the
process's journal before it is counted. In the end the main process makes the result from all journals; so a command
that is given again after a stop only does what is missing.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.caption_folder import check_place, joined, no_pictures, read_folder
from data_tools.caption_journal import Journal
from data_tools.caption_places import places
from data_tools.caption_result import changed_settings, finish
from data_tools.caption_settings import FORMATS, Settings
from sdtune import distributed
from sdtune.errors import DataError, SdtuneError, UsageError

if TYPE_CHECKING:
    from data_tools.captioner import Captioner, Inputs

ON_GPU, ON_CPU = 32, 8  # pictures a batch


def command(
    pictures: str | Path, *, out: str | Path | None = None, kind: str = "jsonl", as_json: bool = False, **options: Any
) -> int:
    """`sdtune caption`: captions a folder and says how many; returns the exit code: 1 if a picture was rejected.

    Args:
        pictures, out, kind, options: as `caption_folder` has them.
        as_json: print the result as one JSON object.
    """
    result = caption_folder(pictures, out=out, kind=kind, **options)
    if not distributed.is_main():
        return 0
    print(json.dumps(result, ensure_ascii=False) if as_json else _summary(result))
    return 1 if result["rejected"] else 0


def caption_folder(
    pictures: str | Path,
    *,
    out: str | Path | None = None,
    kind: str = "jsonl",
    batch_size: int | None = None,
    workers: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Captions the pictures of a folder.

    Args:
        pictures: folder, with sub-folders.
        out: folder for the captions, with links to the pictures; None writes them beside the pictures.
        kind: "jsonl", "txt" or "parquet".
        batch_size: pictures at a time; None is 32 on a GPU and 8 elsewhere.
        workers: threads that decode pictures; None is one a core, 8 at most.
        settings: as `Settings` has them.

    Returns:
        How many were captioned, kept and rejected, and where it is all written; nothing on processes but the main one.

    Raises:
        UsageError: settings that cannot work, or other ones than those of the run that was stopped.
        DataError: no pictures, a damaged metadata file, a folder that cannot be written.
        WeightsError: the model cannot be had, or is none that captions.
    """
    began = time.perf_counter()
    wanted = Settings(**settings)
    wanted.check()
    if kind not in FORMATS:
        raise UsageError(f"--format: got '{kind}', expected one of {', '.join(FORMATS)}")
    folder = Path(pictures)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"'{folder}' {what}; expected a folder of pictures: sdtune caption FOLDER")
    place = Path(out) if out is not None and Path(out).resolve() != folder.resolve() else folder
    if place != folder and place.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--out: '{out}' lies in '{folder}', whose pictures would stand there twice; name another one")
    journal = Journal(place)
    try:
        result = _run(folder, place, kind, wanted, journal, batch_size, workers)
    except KeyboardInterrupt:
        if distributed.is_main() and (count := len(journal.finished()[0])):
            print(f"{count} captions are kept in '{journal.place}'; the same command goes on", file=sys.stderr)
        raise
    finally:
        if journal.job:  # only the main process has prepared it
            journal.release()
    return result | {"seconds": round(time.perf_counter() - began, 2)} if distributed.is_main() else {}


def _run(
    folder: Path,
    place: Path,
    kind: str,
    wanted: Settings,
    journal: Journal,
    batch_size: int | None,
    workers: int | None,
) -> dict[str, Any]:
    """What each process does; the main one returns the result."""
    with _main_first():
        source = read_folder(folder)
        target = source if place == folder else read_folder(place)
        if not source.pictures and not source.bad_names:
            raise no_pictures(folder)
        where = places(source, target, kind)
        if distributed.is_main():
            check_place(source, target, kind, where.files(kind))
            origin = None if place == folder else str(folder.resolve())
            journal.prepare({**asdict(wanted), "pictures": origin}, wanted)
            if where.unseen:
                print(_unseen(where.unseen, folder), file=sys.stderr)
            if changed := changed_settings(place, wanted):
                print(
                    f"the captions that are kept were written with other settings ({'; '.join(changed)}); with "
                    "--overwrite all are written anew",
                    file=sys.stderr,
                )
    whole = joined(source, target, where.renamed)
    done, _ = journal.finished()
    distributed.barrier()  # all have read, now any may write
    todo = [name for name in source.pictures if name not in done and (wanted.overwrite or not whole.texts(name))]
    if todo:
        mine = todo[distributed.rank() :: distributed.world()]
        _caption(mine, folder, wanted, journal, batch_size, workers, among=len(source.pictures))
    distributed.barrier()
    return finish(source, whole, place, where, kind, wanted, journal) if distributed.is_main() else {}


# --- captioning -------------------------------------------------------------------------------------------------------


def _caption(
    names: Sequence[str],
    folder: Path,
    wanted: Settings,
    journal: Journal,
    batch_size: int | None,
    workers: int | None,
    among: int,
) -> None:
    """Captions the pictures of this process into its journal; `among` is the number of pictures in the folder."""
    from sdtune.libraries import prepare

    prepare()  # before the libraries are imported
    import torch
    from tqdm import tqdm
    from transformers.utils import logging

    from data_tools.captioner import Captioner, choose_device

    logging.set_verbosity_error()  # it warns at each batch of tokens and lengths that are as they should be
    logging.disable_progress_bar()

    with _main_first():  # a download happens once
        captioner = Captioner(wanted, choose_device())
    # The same in each process and after each stop, for captions must not depend on it.
    size = min(batch_size or (ON_GPU if captioner.device.type == "cuda" else ON_CPU), among)
    threads = workers or max(1, min(8, (os.cpu_count() or 1) // distributed.world()))
    bar = tqdm(total=len(names), unit="picture", disable=not distributed.is_main(), mininterval=0.5)
    reader = _reader(captioner, folder)
    try:
        with bar, journal.writer(distributed.rank()) as writer:
            for batch in _batches(_read_ahead(names, reader, threads, 2 * size + threads), size):
                writer.append(_lines(captioner, batch, size))
                bar.update(len(batch))
    except torch.OutOfMemoryError as error:
        raise SdtuneError(
            f"the GPU's memory is full; try --batch-size {max(1, size // 2)}, fewer --num-beams, or a smaller --model. "
            "What is captioned is kept"
        ) from error


def _lines(captioner: "Captioner", batch: Sequence[tuple[str, "Inputs | str"]], size: int) -> list[dict[str, Any]]:
    """Lines for the journal: captions of the good pictures, reasons for the bad ones."""
    good = [(name, inputs) for name, inputs in batch if not isinstance(inputs, str)]
    lines: list[dict[str, Any]] = [{"file_name": name, "reason": why} for name, why in batch if isinstance(why, str)]
    if not good:
        return lines
    written = captioner.write([inputs for _, inputs in good], [name for name, _ in good], size)
    for (name, _), texts in zip(good, written, strict=True):
        captions = [captioner.settings.around(text) for text in texts if text]
        lines.append(
            {"file_name": name, "captions": captions}
            if captions
            else {"file_name": name, "reason": "the model wrote nothing about it"}
        )
    return lines


def _reader(captioner: "Captioner", folder: Path) -> Callable[[str], "Inputs | str"]:
    """From a picture's name to what the model takes, or to the reason why it cannot be had."""
    import warnings

    from PIL import Image

    from sdtune.data.images import open_rgb
    from sdtune.data.picture import refuse_pipe

    # Pillow warns from 89 million pixels on, which cameras reach, and refuses twice as many.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    def read(name: str) -> "Inputs | str":
        try:
            refuse_pipe(folder / name)
            return captioner.prepare(open_rgb(folder / name, captioner.settings.background, name=name))
        except Exception as error:  # the processor's errors too: it took a blank picture, so this one is at fault
            return " ".join(str(error).split()) or type(error).__name__

    return read


def _read_ahead(
    names: Sequence[str], read: Callable[[str], "Inputs | str"], threads: int, ahead: int
) -> Iterator[tuple[str, "Inputs | str"]]:
    """(name, what was read), in order; `ahead` pictures are in work or wait at most."""
    waiting: deque[tuple[str, Future[Inputs | str]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for name in names:
                waiting.append((name, pool.submit(read, name)))
                if len(waiting) >= ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists with `size` good pictures each, and the bad ones between them; the last has what is left."""
    batch: list[Any] = []
    good = 0
    for item in items:
        batch.append(item)
        good += not isinstance(item[1], str)
        if good == size or len(batch) == 4 * size:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch


@contextmanager
def _main_first() -> Iterator[None]:
    """The main process runs the block, then the others do. If it fails there, the launcher ends those that wait."""
    main = distributed.is_main()
    if not main:
        distributed.barrier()
    yield
    if main:
        distributed.barrier()


def _unseen(names: Sequence[str], folder: Path) -> str:
    return (
        f"{len(names)} pictures, such as '{names[0]}', have a name that HF datasets takes for a split, and it will not "
        "find the captions beside them; sdtune train does. For datasets rename them, or write a new folder with: "
        f"sdtune caption {folder} --out {folder}-captioned"
    )


def _summary(result: dict[str, Any]) -> str:
    rejected = f" (see {result['rejected_file']})" if result["rejected"] else ""
    return (
        f"{result['captioned']} captioned, {result['kept']} kept, {result['rejected']} rejected{rejected}: "
        f"{result['out']}"
    )

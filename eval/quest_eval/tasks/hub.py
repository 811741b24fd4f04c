"""LongBench and PG19 through the ``datasets`` library: from the Hugging Face hub or from a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

#: LongBench as its authors publish it: an archive with data/NAME.jsonl. The loading script beside it is of a kind that
#: ``datasets`` dropped with version 4.
LONGBENCH_ARCHIVE = "hf://datasets/THUDM/LongBench/data.zip"
#: PG19's test books as Parquet; the original has a loading script of the same kind.
PG19_TEST = "emozilla/pg19-test"


def longbench(name: str, folder: Path | None) -> list[dict[str, Any]]:
    """The samples of one of LongBench's data sets, with the fields ``input``, ``context`` and ``answers``.

    Args:
        name: as "qasper".
        folder: has NAME.jsonl, data/NAME.jsonl or data.zip; None: from the hub.

    Raises:
        InputError: it cannot be found, or has other fields.
    """
    places = [folder / f"{name}.jsonl", folder / "data" / f"{name}.jsonl"] if folder is not None else []
    there = [str(path) for path in places if path.is_file()]
    archive = LONGBENCH_ARCHIVE if folder is None else str(folder / "data.zip")
    if folder is not None and not there and not (folder / "data.zip").is_file():
        raise InputError(f"--data {folder} must have {name}.jsonl, data/{name}.jsonl or data.zip in it")
    file = there[0] if there else f"zip://data/{name}.jsonl::{archive}"
    rows = _load(f"LongBench's {name}", "a folder with its .jsonl files", "json", data_files=file)
    missing = {"input", "context", "answers"} - set(rows.column_names)
    if missing:
        raise InputError(f"{file} must have the fields input, context and answers, and lacks {', '.join(missing)}")
    return list(rows)


def pg19(folder: Path | None, count: int) -> list[str]:
    """The texts of the first ``count`` test books.

    Args:
        folder: has the books as NUMBER.txt, or under test/ as published; None: from the hub.
        count: the most books.

    Raises:
        InputError: they cannot be found.
    """
    if folder is None:
        rows = _load("PG19's test books", "a folder with the books as .txt files", PG19_TEST)
    else:
        files = sorted(map(str, folder.glob("*.txt"))) or sorted(map(str, folder.glob("test/*.txt")))
        if not files:
            raise InputError(f"--data {folder} must have books in it, as *.txt or test/*.txt")
        rows = _load("the books", "another folder", "text", data_files=files[:count], sample_by="document")
    return [row["text"] for row in rows.select(range(min(count, len(rows))))]


def _load(wanted: str, instead: str, *args: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{wanted} needs the package datasets: run `pip install datasets`") from error
    datasets.disable_progress_bars()
    split = "test" if args[0] == PG19_TEST else "train"  # single files are all called train
    try:
        return datasets.load_dataset(*args, split=split, **options)
    except (OSError, ValueError, RuntimeError) as error:  # offline, versions of datasets differ in their errors
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"{wanted} cannot be had ({reason}): give {instead} as --data") from error
    except datasets.exceptions.DatasetsError as error:
        raise InputError(f"{wanted} cannot be read ({type(error).__name__}): give {instead} as --data") from error

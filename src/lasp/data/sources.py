"""All the text of a store: which files, in which order, and which part of them is held out."""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lasp.data.build import FORMAT
from lasp.data.corpus import TextFile, search
from lasp.data.documents import Document, Reading, Split, choose_split, documents_of, is_records
from lasp.data.tokenizer import Tokenizer
from lasp.data.verified import Verified
from lasp.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Files with the split of each, and how to read them."""

    files: list[tuple[TextFile, Split]]
    field: str
    on_bad_record: str
    reading: Reading = dataclasses.field(default_factory=Reading)
    """Counted while `documents` are read."""

    @staticmethod
    def find(
        sources: tuple[Path | None, ...],
        suffixes: tuple[str, ...],
        field: str,
        validation_fraction: float,
        seed: int,
        validation_path: Path | None,
        on_bad_record: str,
    ) -> "Sources":
        """The text of `sources`, each as `lasp.data.corpus.search` takes it, one after another.

        validation_path: text to validate on; without it, what `choose_split` chooses. Raises DataError.
        """
        reading, files = Reading(), list[TextFile]()
        for source in sources:
            found = search(source, suffixes, seed)
            files += found.files
            reading.leave_out(found.left_out)
        if validation_path is not None:
            train = Split(fraction=validation_fraction, rule="train")
            own = Split(fraction=validation_fraction, rule="validation")
            held = search(validation_path, suffixes, seed)
            reading.leave_out(held.left_out)
            divided = [(file, train) for file in files] + [(file, own) for file in held.files]
        else:
            with _naming_files():
                split = choose_split(files, field, validation_fraction, skip_bad=on_bad_record == "skip")
            divided = [(file, split) for file in files]
        return Sources(files=divided, field=field, on_bad_record=on_bad_record, reading=reading)

    def documents(self) -> Iterator[Document]:
        """Once: `reading` counts them."""
        skip = self.on_bad_record == "skip"
        for file, split in self.files:
            yield from documents_of(file, self.field, split, skip_bad=skip, reading=self.reading)

    def key(self, tokenizer: Tokenizer, verified: Verified) -> str:
        """Names the store: a hash of the files' names and bytes and of all that makes tokens of them."""
        digest = hashlib.sha256(f"{FORMAT}\0{tokenizer.name}\0{tokenizer.separator}\0".encode())
        with _naming_files():
            digests = [verified.sha256(file.path) for file, _ in self.files]
        for (file, split), sha256 in zip(self.files, digests, strict=True):
            how = f"{self.field}\0{self.on_bad_record}" if is_records(file.path) else ""
            line = f"{how}\0{split.rule}\0{split.fraction}\0{file.name}\0{sha256}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@contextmanager
def _naming_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a link to nothing, a file of somebody else's
        raise DataError(f"cannot read the text: {error}") from error

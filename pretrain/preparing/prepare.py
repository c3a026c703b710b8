"""Raw text to a tokenizer and shards of token ids: `launch/prepare.py`; each source's part is in `corpus.py`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.console import LiveLine, format_bytes, format_duration
from pretrain.data.shards import MANIFEST_NAME, Manifest
from pretrain.data.source_files import list_files, token_format
from pretrain.errors import ConfigError, DataError, LonghaulError
from pretrain.options.config import Config, SourceSection
from pretrain.options.phases import sampling_weights, val_fraction_of
from pretrain.preparing.corpus import Corpus, add_rows, no_documents
from pretrain.preparing.journal import file_lock, wrong_kind
from pretrain.preparing.refining import open_refiner
from pretrain.preparing.shares import Share
from pretrain.preparing.sources import ReadLog, document_digest, is_validation, read_documents
from pretrain.preparing.tar_folder import is_index, refuse_own_folder, tars_of
from pretrain.preparing.tar_index import TarIndex
from pretrain.preparing.workers import fit_in_process, num_processes
from pretrain.storage.stores import is_remote, shown
from pretrain.tokenizers.hf_tokenizer import check_ids
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, choose_sample, fit, report
from pretrain.tokenizers.tokenizer import Tokenizer, check_round_trip, save_file
from pretrain.tokenizers.tokenizer_files import main_file, open_tokenizer
from pretrain.tokenizers.tokenizer_trial import try_out
from pretrain.tokenizers.varied_texts import varied_texts

READ_MULTIPLE = 10  # the tokenizer's sample is chosen from at most this many times its size
HELD_OUT_BYTES = 4_000_000  # of documents that a new tokenizer is checked on


def prepare(
    config: Config, share: tuple[int, int] | None = None, num_shares: int = 0, makes_index: bool = False
) -> None:
    """Train the tokenizer if its file does not exist, then turn every source with `paths` into indexed shards.

    A source without `paths` gets its row tables only: one for each length of rows that the run has.

    Args:
        config: the config.
        share: make only the K-th of N shares of every source; the tokenizer must exist.
        num_shares: merge so many shares of every source instead of tokenizing.
        makes_index: of sources whose paths are tars, index these instead of writing shards of ids.

    Raises:
        ConfigError: the config does not fit what was prepared before, or another run is writing the same folder.
        DataError: a source gives nothing, something cannot be read, or the disk is full.
        KeyboardInterrupt: passed on; what is complete stays, and the next run goes on after it.
    """
    line = LiveLine()
    sources = config.data.sources
    try:
        indexed = _indexed(config, makes_index)
        for source in sources:
            if source.paths and source.name not in indexed:
                refuse_own_folder(source)
        if share is not None and not main_file(config.tokenizer.model).exists():
            raise ConfigError(
                f"tokenizer.model is {config.tokenizer.model}, which does not exist; expected it, since every share "
                "needs the same one. Train it first: python launch/prepare.py CONFIG --train-tokenizer"
            )
        if any(source.paths for source in sources):
            tokenizer = _open_tokenizer(config, line)
        for source in sources:
            if share is not None and source.paths:
                check_complete(source, config, tokenizer, line)
            if source.name in indexed:
                TarIndex(source, config, tokenizer, line).prepare()
            elif source.paths and share is not None:
                Share(source, config, tokenizer, line, *share).prepare()
            elif source.paths:
                Corpus(source, config, tokenizer, line, num_shares).prepare()
            elif is_remote(source.shards):
                line.say(f"{source.name}: {shown(source.shards)} is read as it is")
            elif share is None:
                for seq_len in config.data.seq_lens:
                    add_rows(Path(source.shards), Manifest.load(source.shards), seq_len, config.data.packing)
                lengths = " and ".join(map(str, config.data.seq_lens))
                line.say(f"{source.name}: {source.shards} has rows of {lengths} tokens")
    except OSError as error:
        raise DataError(
            f"{error.filename or 'prepare'}: {error.strerror or error}. What is complete is kept: mend this (free some "
            "space, or set the permissions) and run again."
        ) from error
    finally:
        line.end()


def _indexed(config: Config, makes_index: bool) -> set[str]:
    """The sources that are tars with an index: those that have one, and those that are to get one."""
    sources = [source for source in config.data.sources if source.paths]
    is_complete = {source.name: Path(source.shards, MANIFEST_NAME).exists() for source in sources}
    indexed = {source.name for source in sources if is_complete[source.name] and is_index(source.shards)}
    if makes_index:
        for source in sources:
            if source.name in indexed or not _names_tars(source, is_complete[source.name]):
                continue
            if is_complete[source.name]:
                raise wrong_kind(Path(source.shards), holds_index=False)
            if source.augment.back_translation:
                raise ConfigError(
                    f"--index: data.sources[{source.name}].augment.back_translation is "
                    f"{source.augment.back_translation}; expected none, because the training shards are the tars as "
                    "they are. Run without --index, or leave it out."
                )
            indexed.add(source.name)
        if not indexed:
            raise ConfigError(
                "--index: no source names tars; expected one of data.sources[].paths to be .tar files. Run without "
                "--index for other files."
            )
    return indexed


def _names_tars(source: SourceSection, is_complete: bool) -> bool:
    """Whether a source can be indexed; of one that is complete, the files may be gone."""
    if source.examples is not None:
        return False
    try:
        return bool(tars_of(source))
    except LonghaulError:
        if is_complete:
            return False
        raise


def check_complete(source: SourceSection, config: Config, tokenizer: Tokenizer, line: LiveLine) -> None:
    """Check that what is complete of a source with `paths` is what the config describes; writes nothing.

    Raises:
        ConfigError, DataError: it is not, or something of it is missing.
    """
    if Path(source.shards, MANIFEST_NAME).exists():
        manifest = Manifest.load(source.shards)
        made = Corpus if manifest.text is None else TarIndex
        made(source, config, tokenizer, line).check_complete(manifest)


def prepare_tokenizer(config: Config) -> None:
    """Train the tokenizer if its file does not exist, and do nothing else.

    Raises:
        ConfigError, DataError: as `prepare`.
    """
    line = LiveLine()
    try:
        tokenizer = _open_tokenizer(config, line)
        line.say(f"tokenizer: {config.tokenizer.model} is there, {tokenizer.vocab_size:,} ids")
    finally:
        line.end()


def _open_tokenizer(config: Config, line: LiveLine) -> Tokenizer:
    """The tokenizer of the config, trained now if its file does not exist."""
    path = main_file(config.tokenizer.model)
    if not path.exists():
        check_untokenized(config)
        with file_lock(path.with_name(f".{path.name}.lock"), str(path)):
            if not path.exists():
                _train_tokenizer(config, path, line)
    tokenizer = open_tokenizer(config.tokenizer)
    is_needed = any(source.paths and not Path(source.shards, MANIFEST_NAME).exists() for source in config.data.sources)
    if is_needed and not tokenizer.is_exact:
        for text in try_out(tokenizer, _training_texts(config, []), config.run.seed):
            line.say(f"tokenizer: {text}")
    return tokenizer


def check_untokenized(config: Config) -> None:
    """Check that no source holds ids of a tokenizer that is not there.

    Raises:
        ConfigError: one does, and they cannot be those of a tokenizer that would be trained now.
    """
    for source in config.data.sources:
        if source.paths and source.examples is not None:
            raise ConfigError(
                f"tokenizer.model is {config.tokenizer.model}, which does not exist; expected that of the model which "
                f"the examples of data.sources[{source.name}] are for. Name it, such as the one in its run folder."
            )
        if source.paths and (held := token_format(list_files(source))):
            raise ConfigError(
                f"tokenizer.model is {config.tokenizer.model}, which does not exist; expected the tokenizer that the "
                f"ids of data.sources[{source.name}] ({held}) were made with. Copy it there."
            )


def _train_tokenizer(config: Config, path: Path, line: LiveLine) -> None:
    """Train the tokenizer, check it, and only then give it its name."""
    section = config.tokenizer
    held_out: list[str] = []
    line.say(f"tokenizer: reading a sample of {format_bytes(section.sample_bytes)}")
    sample = choose_sample(_training_texts(config, held_out), section.sample_bytes, config.run.seed)
    begin = time.monotonic()
    line.say(f"tokenizer: training {section.vocab_size:,} pieces on {format_bytes(sum(map(len, sample)))} of text")
    model = fit(sample, section) if num_processes(config.data) == 1 else fit_in_process(sample, section)
    unchecked = path.with_name(path.name + ".unchecked")
    save_file(unchecked, model)
    tokenizer = SentencePieceTokenizer(unchecked, section.bos, section.eos)
    kind = "held-out" if held_out else "sampled"
    judged_on = held_out or [chunk.decode() for chunk in sample[:500]]
    texts = judged_on + varied_texts(500, config.run.seed, judged_on)
    for fault, different in (
        ("do not come back from their ids", check_round_trip(tokenizer, texts)),
        ("get other ids from the exported tokenizer", check_ids(tokenizer, texts)),
    ):
        if different:
            raise DataError(
                f"{unchecked}: {len(different)} of {len(texts)} texts {fault}, such as {different[0][:80]!r}; expected "
                "none. Please report this with the file."
            )
    os.replace(unchecked, path)
    line.say(
        f"tokenizer: wrote {path} after {format_duration(time.monotonic() - begin)}; {len(texts):,} "
        f"{kind} and made-up texts come back exactly, with the same ids in the export"
    )
    for text in report(tokenizer, judged_on, kind).splitlines():
        line.say(f"tokenizer: {text}")


def _training_texts(config: Config, held_out: list[str]) -> Iterator[str]:
    """Training documents of all texts, by weight where there is more than is read; some others go to `held_out`."""
    files_of = {source.name: list_files(source) for source in config.data.sources if source.paths}
    sources = [
        source for source in config.data.sources
        if source.paths and source.examples is None and token_format(files_of[source.name]) is None
    ]  # fmt: skip
    weights = sampling_weights(config)
    total_weight = sum(weights.get(source.name, 0.0) for source in sources)
    held_out_bytes = 0

    def by_seeded_hash(file: Path) -> bytes:
        return hashlib.sha256(f"{config.run.seed} {file.name}".encode()).digest()

    for source in sources:
        limit = READ_MULTIPLE * config.tokenizer.sample_bytes * weights.get(source.name, 0.0) / total_weight
        read_bytes = 0
        files = sorted(files_of[source.name], key=by_seeded_hash)
        log, refine = ReadLog(), open_refiner(files, source, config.data)
        policy = config.data.on_bad_document, config.data.on_bad_file, log, True, refine
        for document in read_documents(files, source, *policy):
            data = document.text.encode()
            read_bytes += len(data)
            if not is_validation(document_digest(data), val_fraction_of(source, config.data)):
                yield document.text
            elif held_out_bytes < HELD_OUT_BYTES:
                held_out.append(document.text[:100_000])
                held_out_bytes += len(data)
            if read_bytes >= limit:
                break
        if not log.counts["documents_read"]:
            raise no_documents(source, log)

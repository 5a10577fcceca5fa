"""Which prompts overlap with the texts of a benchmark, by word n-grams.

Words are runs of letters and digits, in lower case; a Chinese or Japanese character is a word of its own. Of a prompt and a
benchmark text, that with fewer n-grams is the shorter one, and the overlap is the share of its n-grams that the other
contains as well: a benchmark item that lies whole inside a long prompt overlaps by 1, and so does a prompt that lies whole
inside an item. A text of fewer than ``words`` words is one n-gram of all its words; inside a longer text it is looked for only
if it has ``short_words`` or more, since shorter ones ("write a poem about love") occur everywhere.

Thirteen words are what GPT-3's authors and most others since have used (arXiv 2005.14165, appendix C); they count a text as
soon as a single n-gram is shared (``share=0`` here), which also finds what only uses a benchmark's standing instructions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
import scipy
from numpy.typing import NDArray
from pydantic import Field, model_validator

from charm_core.records import Record

UInt64s = NDArray[np.uint64]
Ints = NDArray[np.int64]

_WORD = r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\w--[\p{Han}\p{Hiragana}\p{Katakana}_]]+"
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK_PROMPTS = 20_000
_BLOCK_MATCHES = 20_000_000
"""Additions in one product of matrices, which bounds its memory whatever the benchmark repeats."""
_NONE_FOUND = pl.DataFrame(schema={"prompt": pl.Int64, "group": pl.Int64, "text": pl.Int64, "share": pl.Float64})


class OverlapConfig(Record):
    """When a prompt counts as known from a benchmark."""

    words: int = Field(default=13, ge=2, le=50, description="Words per n-gram.")
    share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the shorter text's n-grams that must occur in the other; 0: any shared n-gram.",
    )
    short_words: int = Field(
        default=8,
        ge=1,
        description="Texts of fewer words than an n-gram are looked for inside longer texts if they have this many.",
    )

    @model_validator(mode="after")
    def _short_is_short(self) -> Self:
        if self.short_words > self.words:
            raise ValueError(f"short_words={self.short_words} must not exceed words={self.words}")
        return self


def find_overlaps(
    prompts: Sequence[str], benchmarks: Mapping[str, Sequence[str]], config: OverlapConfig | None = None
) -> pl.DataFrame:
    """Find the prompts that overlap with texts of benchmarks.

    Args:
        prompts: Texts of the prompts.
        benchmarks: Name of a benchmark to its texts.
        config: Length of the n-grams, and how much must be shared.

    Returns:
        prompt (position), benchmark (name), text (position in the benchmark) and share (in (0, 1]): one row per prompt and
        benchmark that overlap, with the text that does most, by prompt and then by name.
    """
    settings = config or OverlapConfig()
    names = sorted(benchmarks)
    sizes = [len(benchmarks[name]) for name in names]
    words = _words(pl.Series([text for name in names for text in benchmarks[name]], dtype=pl.String))
    vocabulary = words.select("word").unique().sort("word").with_row_index("code", offset=1)
    known = _Benchmarks(
        corpus=_Corpus.build(words, vocabulary, sum(sizes)), group_of=np.repeat(np.arange(len(names)), sizes)
    )
    found = [
        _overlaps_of_block(list(prompts[start : start + _BLOCK_PROMPTS]), start, known, vocabulary, settings)
        for start in range(0, len(prompts), _BLOCK_PROMPTS)
    ]
    best = (
        pl.concat([_NONE_FOUND, *found])
        .sort("prompt", "group", "share", "text", descending=[False, False, True, False])
        .unique(["prompt", "group"], keep="first", maintain_order=True)
    )
    offsets = pl.DataFrame(
        {"group": range(len(names)), "benchmark": names, "first": np.cumsum([0, *sizes])[:-1]},
        schema={"group": pl.Int64, "benchmark": pl.String, "first": pl.Int64},
    )
    return best.join(offsets, on="group", maintain_order="left").select(
        "prompt", "benchmark", pl.col("text") - pl.col("first"), "share"
    )


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """Texts as one array of word values, those of one text after those of another."""

    values: UInt64s
    known: NDArray[np.bool_]
    """False for words that the benchmark does not have."""
    lengths: Ints
    """Words per text."""
    starts: Ints
    """Where each text's words begin."""

    @classmethod
    def build(cls, words: pl.DataFrame, vocabulary: pl.DataFrame, count: int) -> "_Corpus":
        codes = (
            words.join(vocabulary, on="word", how="left", maintain_order="left")
            .get_column("code")
            .fill_null(0)
            .to_numpy()
            .astype(np.uint64)
        )
        lengths = np.bincount(words.get_column("text").to_numpy(), minlength=count).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if count else lengths
        return cls(values=_scrambled(codes), known=codes > 0, lengths=lengths, starts=starts)

    def windows(self, most: int) -> Iterator[tuple[int, UInt64s, NDArray[np.bool_]]]:
        """(length, value of the window that begins at each word, whether all its words are known), shortest first.

        A window may reach into the next text; ``grams`` takes those that do not.
        """
        value, known = self.values.copy(), self.known.copy()
        for length in range(1, most + 1):
            if length > 1:
                # the value of a window is a polynomial in its words, modulo 2**64
                complete = slice(0, max(0, value.size - length + 1))
                value[complete] = value[complete] * _MULTIPLIER + self.values[length - 1 :]
                known[complete] &= self.known[length - 1 :]
            yield length, value, known

    def grams(self, length: int, chosen: NDArray[np.bool_], value: UInt64s, known: NDArray[np.bool_]) -> "_Grams":
        """Every known window of that length in the chosen texts."""
        per_text = np.where(chosen, self.lengths - length + 1, 0).clip(min=0)
        owners = np.repeat(np.arange(self.lengths.size), per_text)
        offsets = np.arange(owners.size) - np.repeat(np.cumsum(per_text) - per_text, per_text)
        positions = self.starts[owners] + offsets
        kept = known[positions]
        return _Grams(owners=owners[kept], values=value[positions[kept]], per_text=per_text)


@dataclass(frozen=True, kw_only=True)
class _Grams:
    """The n-grams of some texts, one entry per place where one occurs."""

    owners: Ints
    values: UInt64s
    per_text: Ints
    """How many each text has, those with unknown words included."""

    def counted(self, vocabulary: UInt64s) -> "scipy.sparse.csr_array":
        """How often each n-gram of a sorted vocabulary occurs in each text: texts × n-grams."""
        columns = np.searchsorted(vocabulary, self.values)
        there = np.append(vocabulary, np.uint64(0))[columns] == self.values
        there &= columns < vocabulary.size
        ones = np.ones(int(there.sum()), dtype=np.int32)
        return scipy.sparse.csr_array(
            (ones, (self.owners[there], columns[there])), shape=(self.per_text.size, vocabulary.size)
        )


@dataclass(frozen=True, kw_only=True)
class _Benchmarks:
    """The texts of all benchmarks, those of one after those of another."""

    corpus: _Corpus
    group_of: Ints
    """Which benchmark each text belongs to."""


def _words(texts: pl.Series) -> pl.DataFrame:
    """text, word: the words of all texts in order."""
    return (
        pl.DataFrame({"words": texts})
        .with_row_index("text")
        .with_columns(pl.col("words").str.to_lowercase().str.extract_all(_WORD))
        .explode("words", empty_as_null=False)
        .rename({"words": "word"})
    )


def _scrambled(codes: UInt64s) -> UInt64s:
    """The splitmix64 finaliser: consecutive numbers to values that look random, so that windows do not collide."""
    mixed = (codes + np.uint64(1)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _overlaps_of_block(
    prompts: list[str], first: int, known: _Benchmarks, vocabulary: pl.DataFrame, config: OverlapConfig
) -> pl.DataFrame:
    asked, benchmark = (
        _Corpus.build(_words(pl.Series(prompts, dtype=pl.String)), vocabulary, len(prompts)),
        known.corpus,
    )
    found = []
    both = zip(asked.windows(config.words), benchmark.windows(config.words), strict=True)
    for (length, mine, i_know), (_, theirs, they_know) in both:
        for in_prompts, in_texts in _compared(asked.lengths, benchmark.lengths, length, config):
            if in_prompts.any() and in_texts.any():
                ours = asked.grams(length, in_prompts, mine, i_know)
                others = benchmark.grams(length, in_texts, theirs, they_know)
                found.append(_best_shares(ours, others, known.group_of))
    shares = pl.concat([_NONE_FOUND, *found])
    return shares.filter(pl.col("share") >= config.share).with_columns(pl.col("prompt") + first)


def _compared(
    prompts: Ints, texts: Ints, length: int, config: OverlapConfig
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Which prompts are held against which texts with n-grams of a length, by their numbers of words."""
    if length == config.words:
        return [(prompts >= length, texts >= length)]
    if length < config.short_words:
        return [(prompts == length, texts == length)]
    return [(prompts == length, texts >= length), (prompts > length, texts == length)]


def _best_shares(mine: _Grams, theirs: _Grams, group_of: Ints) -> pl.DataFrame:
    """For each prompt and benchmark, the text with which it shares most of the shorter one's n-grams, and that share."""
    vocabulary = np.unique(theirs.values)
    in_prompts, in_texts = mine.counted(vocabulary), theirs.counted(vocabulary)
    grams = (mine.per_text, theirs.per_text)
    blocks = _row_blocks(in_prompts, in_texts)
    found = [_best_of_rows(in_prompts, in_texts, rows, grams, group_of) for rows in blocks]
    return pl.concat([_NONE_FOUND, *found])


def _row_blocks(in_prompts: "scipy.sparse.csr_array", in_texts: "scipy.sparse.csr_array") -> Iterator[Ints]:
    """The prompts that share an n-gram with any text, in blocks of about equal work."""
    times = np.bincount(in_texts.indices, minlength=in_texts.shape[1])
    work = np.add.reduceat(
        np.append(times[in_prompts.indices], 0), np.minimum(in_prompts.indptr[:-1], in_prompts.indices.size)
    )
    rows = np.flatnonzero(np.diff(in_prompts.indptr))
    block = np.cumsum(work[rows]) // _BLOCK_MATCHES
    yield from np.split(rows, np.flatnonzero(np.diff(block)) + 1) if rows.size else []


def _best_of_rows(
    in_prompts: "scipy.sparse.csr_array",
    in_texts: "scipy.sparse.csr_array",
    rows: Ints,
    grams: tuple[Ints, Ints],
    group_of: Ints,
) -> pl.DataFrame:
    ours = in_prompts[rows]
    # the n-grams of a prompt that a text has, at every place of the prompt; and the other way round
    of_prompt, of_text = (ours @ _present(in_texts).T).tocsr(), (_present(ours) @ in_texts.T).tocsr()
    of_prompt.sort_indices()
    of_text.sort_indices()  # now the entries of both are those of the same pairs, in the same order
    prompt, text = np.repeat(rows, np.diff(of_prompt.indptr)), of_prompt.indices.astype(np.int64)
    in_prompt, in_text = grams[0][prompt], grams[1][text]
    share = np.where(in_prompt <= in_text, of_prompt.data / in_prompt, of_text.data / in_text)
    pair = prompt * (group_of.max() + 1) + group_of[text]
    order = np.lexsort((text, -share, pair))
    best = order[np.flatnonzero(np.diff(pair[order], prepend=-1))]
    columns = {"prompt": prompt[best], "group": group_of[text[best]], "text": text[best], "share": share[best]}
    return pl.DataFrame(columns, schema=_NONE_FOUND.schema)


def _present(counted: "scipy.sparse.csr_array") -> "scipy.sparse.csr_array":
    return scipy.sparse.csr_array((np.ones_like(counted.data), counted.indices, counted.indptr), shape=counted.shape)

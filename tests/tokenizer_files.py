"""Tokenizer files as people have them: small, and saved with settings of the use that they come from."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/|[]_.,?! "
WORDS = ["hello", "world", "red", "end.", "hel", "wor"]


def byte_level(path: Path) -> Path:
    """A byte-level BPE that cuts to 16 tokens, fills up to 16, and drops merges at random."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join([*WORDS, "<|end"])] * 9, trainer)  # "<|" is one token
    tokenizer.model.dropout = 0.5
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(pad_token="<pad>", pad_id=0, length=16)
    tokenizer.save(str(path))
    return path


def pieces(path: Path) -> Path:
    """A Unigram model with spaces as part of its pieces, which has its end-of-text token as a piece too."""
    special = ["<unk>", "</s>", "<pad>"]
    spaced = [word for piece in WORDS for word in (piece, "\u2581" + piece)]
    vocabulary = [(piece, 0.0) for piece in special] + [(piece, -2.0) for piece in spaced]
    vocabulary += [(letter, -9.0) for letter in LETTERS.replace(" ", "\u2581")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.enable_padding(pad_token="<pad>", pad_id=2, length=64)
    tokenizer.save(str(path))
    return path


def gaps(path: Path) -> Path:
    """A BPE of single letters whose ids have gaps, and no end-of-text token; what it does not know it leaves out."""
    tokenizer = Tokenizer(models.BPE({letter: 7 * place for place, letter in enumerate(LETTERS)}, []))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken("<user>", special=True)])
    tokenizer.enable_truncation(8)
    tokenizer.save(str(path))
    return path


KINDS = {"byte-level": byte_level, "pieces": pieces, "gaps": gaps}

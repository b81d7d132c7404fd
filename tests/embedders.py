"""Embedders for the tests of `--embedder`: from a list of texts to lists of floats."""

SUBJECTS = [("dog", "puppy", "hound"), ("car", "automobile", "lorry"), ("rain", "weather", "storm")]
calls: list[list[str]] = []


def by_subject(texts: list[str]) -> list[list[float]]:
    """One dimension for each subject: meaning instead of spelling."""
    calls.append(list(texts))
    return [[float(any(word in text.lower() for word in subject)) for subject in SUBJECTS] for text in texts]


def by_length(texts: list[str]) -> list[tuple[int, int]]:
    return [(len(text), 1) for text in texts]


def too_few(texts: list[str]) -> list[list[float]]:
    return [[1.0]] * (len(texts) - 1)


def uneven(texts: list[str]) -> list[list[float]]:
    return [[1.0] * len(text) for text in texts]


def endless(texts: list[str]) -> list[list[float]]:
    return [[float("inf")] for _ in texts]


def broken(texts: list[str]) -> list[list[float]]:
    raise RuntimeError("no model at /secret/path")


not_a_function = 7

"""The convention of the sources, in closed form: LayerNorm folded into the next weights, writing
weights centred.

With c(x) = x - mean(x) over d_model, for models whose norms centre (LayerNorm): resid and sublayer
outputs are c(raw); W_V is gain * W_V, then minus its mean over d_model; W_O is minus its mean over
d_model. For RMSNorm the streams are raw, W_V is gain * W_V, W_O raw. All functions are numpy, in
the caller's dtype.
"""

import numpy as np


def centre(x: np.ndarray) -> np.ndarray:
    """x minus its mean over the last axis."""
    centred: np.ndarray = x - x.mean(-1, keepdims=True)
    return centred


def fold_reading(weight: np.ndarray, gain: np.ndarray, centres: bool) -> np.ndarray:
    """A reading weight (…, d_model, d_head) with the gain (d_model,) of the norm before it folded
    in.
    """
    folded: np.ndarray = gain[:, None] * weight
    return folded - folded.mean(-2, keepdims=True) if centres else folded


def fold_writing(weight: np.ndarray, centres: bool) -> np.ndarray:
    """A writing weight (…, d_head, d_model), centred where the next norm ignores the mean."""
    return centre(weight) if centres else weight


def expand_heads(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Grouped key or value weights (n_kv, d_model, d_head) repeated for the query heads that share
    them.
    """
    return weight if len(weight) == n_heads else np.repeat(weight, n_heads // len(weight), axis=0)


def ov_grams(W_V: np.ndarray, W_O: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W_V^T W_V and W_O W_O^T in fp64, each (n_heads, d_head, d_head), from (n_heads, d_model,
    d_head) and its mirror.
    """
    V, O = W_V.astype(np.float64, copy=False), W_O.astype(np.float64, copy=False)  # noqa: E741
    return V.swapaxes(-1, -2) @ V, O @ O.swapaxes(-1, -2)


def ov_norms(W_V: np.ndarray, W_O: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frobenius and spectral norms of W_V W_O per head, shapes (n_heads,), without forming the
    product.

    The squared Frobenius norm is tr(W_V^T W_V · W_O W_O^T); the squared spectral norm is the
    largest eigenvalue of R^T (W_O W_O^T) R with R R^T = W_V^T W_V.
    """
    grams = ov_grams(W_V, W_O)
    return product_frobenius(*grams), product_spectral(*grams)


def product_frobenius(reading: np.ndarray, writing: np.ndarray) -> np.ndarray:
    """Frobenius norms of products of matrices with these Gram matrices (…, d_head, d_head), which
    are symmetric: tr(A B) is their inner product.
    """
    return np.asarray(np.sqrt(np.maximum((reading * writing).sum((-1, -2)), 0)))


def product_spectral(reading: np.ndarray, writing: np.ndarray) -> np.ndarray:
    """Largest singular values of the same."""
    return np.asarray(np.sqrt(product_eigenvalues(reading, writing)[..., -1]))


def product_eigenvalues(reading: np.ndarray, writing: np.ndarray) -> np.ndarray:
    """Eigenvalues, ascending and not negative, of the product of two Gram matrices (…, d_head,
    d_head): sigma_i² of W_OV.
    """
    root = _root(reading)
    eigenvalues: np.ndarray = np.maximum(
        np.linalg.eigvalsh(root.swapaxes(-1, -2) @ writing @ root), 0
    )
    return eigenvalues


def product_rounding(d_model: int, d_head: int) -> float:
    """What rounding may do to squared norms of W_OV that are made of Gram matrices, as a part of
    ‖W_V‖²‖W_O‖².

    Sums of d_model terms in the Gram matrices and of d_head in their product and its eigenvalues,
    in fp64 (Higham 2002, §4.2). It is no part of the squared norms themselves, which cancellation
    can leave much smaller.
    """
    return 8 * d_model * d_head * 2.0**-53


def _root(gram: np.ndarray) -> np.ndarray:
    """Matrices R with R R^T = gram."""
    try:
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:  # not of full rank, like that of a head of zeros
        values, vectors = np.linalg.eigh(gram)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0))[..., None, :])


def random_inputs(n: int, d_model: int, centres: bool, seed: int) -> np.ndarray:
    """What a norm without gain makes of Gaussian vectors: mean 0 and variance 1 (LayerNorm), or
    unit RMS; (n, d_model).
    """
    x = np.random.default_rng(seed).standard_normal((n, d_model))
    x = centre(x) if centres else x
    normalised: np.ndarray = x / np.sqrt((x**2).mean(-1, keepdims=True))
    return normalised


def response_tolerance(eigenvalues: np.ndarray, n: int, false_alarm: float) -> float:
    """How far the mean of n squared responses to random_inputs may lie from its expectation,
    sum(eigenvalues).

    eigenvalues are those of the response's quadratic form, d/k · sigma_i² with k the inputs'
    degrees of freedom. Laurent and Massart (2000, lemma 1) bound a weighted sum of squared
    Gaussians: with probability at least 1 - exp(-t) it exceeds its mean by no more than 2|a|√t +
    2·max(a)·t, and the lower side is closer. A normalised Gaussian vector is the conditional mean
    of a Gaussian one given its direction, so by Jensen its moment generating function is no larger
    and the same bound holds.
    """
    t = np.log(2 / false_alarm)
    return float(2 * np.sqrt((eigenvalues**2).sum() * t / n) + 2 * eigenvalues.max() * t / n)

"""What features look like without any label: RankMe, LiDAR, their spread, and how many dimensions say nothing.

The loss of I-JEPA says little (its targets move, and it is low after a collapse too), so these are what to watch.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

DEAD = 0.01  # a dimension whose standard deviation is below this share of the features' root mean square is dead
_EPS = 1e-7  # of both papers, inside the entropy
_RIDGE = 1e-4  # of LiDAR, on the covariance within


def rankme(features: Tensor) -> float:
    """RankMe of features `[n, D]`: the exponential of the entropy of their normalised singular values.

    Between 1 (collapsed) and min(n, D). Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained
    Self-Supervised Representations by Their Rank" (arXiv 2210.02885), equation 1.
    """
    singular = torch.linalg.svdvals(features.double())
    return _perplexity(singular)


def lidar(features: Tensor) -> float:
    """LiDAR of features `[n, views, D]`, of at least two views of each of at least two images.

    RankMe of what tells images apart, measured against what varies between views of one image: the exponential of the
    entropy of the eigenvalues of S_w^-1/2 S_b S_w^-1/2. Thilak et al., "LiDAR: Sensing Linear Probing Performance in
    Joint Embedding SSL Architectures" (arXiv 2312.04000), equations 1 to 4, with their 1e-4 added to S_w.
    """
    n, views, dim = features.shape
    if n < 2 or views < 2:
        raise ValueError(f"LiDAR needs at least 2 images of at least 2 views, not {n} of {views}")
    features = features.double()
    means = features.mean(1)
    between = torch.cov(means.T).reshape(dim, dim)
    inside = (features - means[:, None]).flatten(0, 1)
    within = inside.T @ inside / (n * (views - 1)) + _RIDGE * torch.eye(dim, device=features.device).double()
    # The eigenvalues of S_w^-1/2 S_b S_w^-1/2 are those of L^-1 S_b L^-T, where S_w = L L^T.
    lower = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(lower, between, upper=False)
    both = torch.linalg.solve_triangular(lower, half.T, upper=False)
    return _perplexity(torch.linalg.eigvalsh((both + both.T) / 2).clamp_min(0))


def spread(features: Tensor) -> dict[str, float]:
    """How features `[n, D]` are spread: six numbers.

    `mean`: of all values. `variance`: over images, the mean over dimensions. `std`: over images, the mean over
    dimensions. `relative_std`: the root of `variance` as a share of the root mean square of all values, 0 where all
    images look alike. `dead`: the share of dimensions whose standard deviation over images is below `DEAD` of that root
    mean square. `cosine`: the mean cosine similarity between two different images.
    """
    features = features.double()
    n = len(features)
    variance = features.var(0, correction=0)
    rms = features.square().mean().sqrt().clamp_min(1e-30)
    unit = F.normalize(features, dim=1)
    # The sum over all pairs is the squared length of the sum; each image with itself comes off.
    cosine = (unit.sum(0).square().sum() - unit.square().sum()) / max(n * (n - 1), 1)
    return {
        "mean": float(features.mean()),
        "variance": float(variance.mean()),
        "std": float(variance.sqrt().mean()),
        "relative_std": float(variance.mean().sqrt() / rms),
        "dead": float((variance.sqrt() < DEAD * rms).double().mean()),
        "cosine": float(cosine),
    }


def _perplexity(values: Tensor) -> float:
    p = values / values.sum().clamp_min(1e-12) + _EPS
    return float(torch.exp(-(p * p.log()).sum()))

"""One group of LSA modules in a row, computed in a few numbers a token, and its gradient.

Module t adds Zᵀ_t A_t to the tokens X, so X stays the group's input X_1 plus low-rank terms, and what the next module
needs of it follows without touching channels again (X and A centred over the channels where there is a norm):

    projections  X D       =  X_1 D + Σ_j Zᵀ_j (A_j D)
    variance     |X + δ|²  =  |X|² + 2 X·δ + |δ|²,  δ = Zᵀ A,  X·δ = Z · (A Xᵀ)

One product of X_1 with D and A of the whole group takes the place of T norms and T products. Tokens are the last axis
here: a product with r rows is six times as fast as one with r columns (docs/methods.md). T is the modules of a group.
"""

import torch

from coldtap.adaptors.networks.lsa.matrices import LsaShape, Matrices


def run_group(
    shape: LsaShape,
    matrices: Matrices,
    x: torch.Tensor,
    variance: torch.Tensor | None,
    noise: torch.Tensor | None,
    z: torch.Tensor,
    *,
    tokens: int,
) -> None:
    """Compute what a group's modules add, as factors of their A_O.

    Args:
        shape: How the modules are built.
        matrices: Of this group.
        x: (batch · token, channel), the group's input, centred over the channels where modules have a norm.
        variance: (batch · token,), its variance over the channels plus eps; None without a norm.
        noise: (module, rank or 1, batch · token), factors of Z; None where nothing is dropped.
        z: (module · width, batch · token), written here.
        tokens: Tokens a sample.
    """
    u = matrices.into @ x.T
    for t in range(shape.modules):
        start = t * shape.stride
        own = start + 3 * shape.rank
        qkv = _scaled(u[start:own], shape, variance) + matrices.shift[t].unsqueeze(1)
        q, k, v = (_split_heads(each, shape.heads, tokens) for each in qkv.split(shape.rank))
        weights = torch.softmax(torch.bmm(q.mT, k), dim=-1)
        z_t = z[t * shape.width : (t + 1) * shape.width]
        z_t[shape.rank :] = 1
        z_t[: shape.rank] = _join_heads(torch.bmm(v, weights.mT), shape.heads)
        if noise is not None:
            z_t[: shape.rank] *= noise[t]
        if t + 1 < shape.modules:
            before = u[own : own + shape.own_rows].clone()
            u[own:].addmm_(matrices.couple[own:, t * shape.width : (t + 1) * shape.width], z_t)
            if variance is not None:
                both = before.add_(u[own : own + shape.own_rows])
                variance = variance + (z_t * both).sum(dim=0) / x.shape[1]


def group_gradient(
    shape: LsaShape,
    matrices: Matrices,
    x: torch.Tensor,
    variance: torch.Tensor | None,
    noise: torch.Tensor | None,
    z: torch.Tensor,
    *,
    tokens: int,
    d_z: torch.Tensor,
    d_matrices: Matrices,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take the gradient of what `run_group` wrote.

    Args:
        shape: As there, like every argument that is not named here.
        matrices: As there.
        x: As there.
        variance: As there.
        noise: As there.
        z: What it wrote.
        tokens: As there.
        d_z: (module · width, batch · token), the gradient of z; overwritten.
        d_matrices: The gradients of `couple` and `shift` are added here; those of `into` and `out` are not.

    Returns:
        The gradient of into · xᵀ, (row, batch · token), and that of the variance, (batch · token,).
    """
    channels, width = x.shape[1], shape.width
    # What `run_group` had when each row was wanted, for all modules at once, since all Z are known.
    u = torch.addmm(matrices.into @ x.T, matrices.couple, z)
    variances = _variances(shape, matrices, u, variance, z, channels)
    d_u = torch.empty_like(u)
    d_variance = None if variance is None else torch.zeros_like(variance)
    for t in reversed(range(shape.modules)):
        start = t * shape.stride
        own = start + 3 * shape.rank
        columns = slice(t * width, (t + 1) * width)
        z_t, d_z_t = z[columns], d_z[columns]
        if d_variance is not None and t + 1 < shape.modules:
            _step_gradient(shape, matrices, d_matrices, u, z_t, d_variance / channels, own, columns, d_u, d_z_t)
        d_z_t.addmm_(matrices.couple[own:, columns].T, d_u[own:])
        scaled = _scaled(u[start:own], shape, None if variances is None else variances[t])
        d_out = d_z_t[: shape.rank] if noise is None else d_z_t[: shape.rank] * noise[t]
        # The mean of softmax's gradient under its weights is d_z · z, noise included on either side.
        mean = d_z_t[: shape.rank] * z_t[: shape.rank]
        d_qkv = _attention_gradient(scaled + matrices.shift[t].unsqueeze(1), d_out, mean, shape, tokens)
        d_matrices.shift[t] += d_qkv.sum(dim=1)
        d_u[start:own] = _scaled(d_qkv, shape, None if variances is None else variances[t])
        if d_variance is not None and variances is not None:
            # Of y / √v, where v was not held at eps.
            d_v = (d_qkv * scaled).sum(dim=0) / (-2 * variances[t].clamp_min(shape.least_variance))
            d_variance = d_variance + d_v * (variances[t] >= shape.least_variance)
    d_matrices.couple.addmm_(d_u, z.T)
    return d_u, d_variance


def _scaled(rows: torch.Tensor, shape: LsaShape, variance: torch.Tensor | None) -> torch.Tensor:
    """Rows divided by the deviation of each token's channels."""
    # Increments may cancel a token to within rounding, which must not make its variance negative.
    return rows if variance is None else rows * variance.clamp_min(shape.least_variance).rsqrt()


def _variances(
    shape: LsaShape, matrices: Matrices, u: torch.Tensor, variance: torch.Tensor | None, z: torch.Tensor, channels: int
) -> torch.Tensor | None:
    """The variance plus eps before each module, (module, batch · token)."""
    if variance is None or shape.modules == 1:
        return None if variance is None else variance.unsqueeze(0)
    steps = [variance]
    for t in range(shape.modules - 1):
        columns = slice(t * shape.width, (t + 1) * shape.width)
        own = slice(t * shape.stride + 3 * shape.rank, (t + 1) * shape.stride)
        both = torch.addmm(u[own], matrices.couple[own, columns], z[columns], beta=2, alpha=-1)
        steps.append(steps[-1] + (z[columns] * both).sum(dim=0) / channels)
    return torch.stack(steps)


def _step_gradient(
    shape: LsaShape,
    matrices: Matrices,
    d_matrices: Matrices,
    u: torch.Tensor,
    z_t: torch.Tensor,
    weight: torch.Tensor,
    own: int,
    columns: slice,
    d_u: torch.Tensor,
    d_z_t: torch.Tensor,
) -> None:
    """Add the gradient of a module's step of the variance, Z · (2 A Xᵀ − A Aᵀ Z), X with the module's Z in it."""
    rows = slice(own, own + shape.own_rows)
    weighted = z_t * weight
    d_u[rows] = 2 * weighted
    d_z_t += 2 * weight * torch.addmm(u[rows], matrices.couple[rows, columns], z_t, alpha=-1)
    d_matrices.couple[rows, columns].addmm_(weighted, z_t.T, alpha=-1)


def _attention_gradient(
    qkv: torch.Tensor, d_out: torch.Tensor, mean: torch.Tensor, shape: LsaShape, tokens: int
) -> torch.Tensor:
    """The gradient of Q, K and V, (3 · rank, batch · token); softmax's weights are computed again."""
    q, k, v, d_z, mean = (_split_heads(each, shape.heads, tokens) for each in (*qkv.split(shape.rank), d_out, mean))
    weights = torch.softmax(torch.bmm(q.mT, k), dim=-1)
    d_scores = torch.bmm(d_z.mT, v).sub_(mean.sum(dim=1).unsqueeze(-1)).mul_(weights)
    gradients = (torch.bmm(k, d_scores.mT), torch.bmm(q, d_scores), torch.bmm(d_z, weights))
    return torch.cat([_join_heads(each, shape.heads) for each in gradients])


def _split_heads(rows: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """(rank, batch · token) as (batch · head, rank / heads, token)."""
    split: torch.Tensor = rows.view(heads, rows.shape[0] // heads, -1, tokens).permute(2, 0, 1, 3).flatten(0, 1)
    return split


def _join_heads(split: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_split_heads`."""
    joined: torch.Tensor = split.unflatten(0, (-1, heads)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return joined

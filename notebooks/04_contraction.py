# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Variance contraction: a proof that runs
#
# Why would a flatter minimum leak *more*? *Membership Privacy Risks of Sharpness-Aware Minimization* (arXiv
# 2310.00488) answers with a theorem about linear models. Take all models that fit their training data exactly. One
# that is also asked to be insensitive gives outputs on *new* examples that vary less. Members all sit at the same
# output, so the less the others vary, the more the members stand out.
#
# **What this notebook shows.**
#
# - **The theorem holds.** We state it, prove it, and check the proof in symbols and in numbers.
# - **It explains threshold attacks, not LiRA.** When the narrower outputs belong to models that fit exactly, a
#   threshold gains. LiRA wins already, so it has nothing to gain; with noisier outputs it may gain or lose.
# - **SAM does not meet its assumptions.** On a linear model SAM ends where gradient descent ends. The curvature of
#   the training data, the only one that an optimizer sees, contracts nothing.
# - **Real networks** are measured in the last part, on the ensembles of the first notebook. The closing section says
#   what this run found.

# %% tags=["setup"]
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sympy as sp
import torch
from IPython import get_ipython
from IPython.display import display
from scipy import stats
from scipy.linalg import null_space, qr
from scipy.special import owens_t
from threadpoolctl import threadpool_limits
from torch.func import functional_call

from lib.analysis import compare, interpolation
from lib.attacks import intervals, shadow
from lib.data.dataset import inputs
from lib.study import figures, settings
from lib.study.results import Results
from lib.study.text import describe_sign, joined, number, select, show_table, show_text, sign
from lib.training.ensemble import KEEP_WEIGHTS
from lib.training.recipe import Recipe, membership

# %% tags=["parameters"]
# Parameters that a reader would change first; the preset fills in what is None. `make study` takes many more.
preset: str = "default"  # tiny, default, small, fast, paper
dataset: str = "digits"  # digits, mnist5k, cifar10, folder, npz, ...: docs/settings.md lists them
data: str = None  # path, where the data set needs one
arch: str = None  # mlp, cnn, resnet18, wrn28_2, vgg16_bn, ... or your own as package.module:name
optimizers: str = None  # comma-separated, the first is the baseline: "sgd,sam,looksam"
rho: float = None  # radius of SAM's neighbourhood
n_models: int = None  # models per optimizer, an even number
epochs: int = None  # epochs of the main comparison

# %% tags=["setup"]
run = settings.notebook_run(globals())
results = Results("04_contraction", run)
baseline, treatment = run.baseline, run.treatment
figures.style()
show_text(run.describe())

# %% [markdown]
# ## The setting
#
# A linear model $x \mapsto x^\top w$ is trained on $n$ examples: rows of $X$, $[n, d]$, with labels $y_i = \pm 1$.
# Each assumption has a name, so that we can come back to it.
#
# - **(A1) Interpolation.** There are more features than examples, $n < d$, and the rows of $X$ are independent.
#   Training ends at a $w$ with $Xw = y$ exactly. There are infinitely many: $w$ can move freely in the null space of
#   $X$.
# - **(A2) The optimizer picks by a norm.** It ends at $w_G = \arg\min\; w^\top G w$ subject to $Xw = y$.
# - **(A3) Sharpness-awareness changes $G$.** Plain training has $G_0 = I$. A sharpness-aware optimizer has
#   $G_\eta = I + \eta\,\Sigma$ with $\eta > 0$: it also penalizes outputs that react strongly.
# - **(A4) $\Sigma$ is the curvature of the population**, the covariance $\mathbb E\,xx^\top$ of *new* examples.
# - **(A5) Gaussian margins**, for the attacks: a non-member's margin $y\,x^\top w$ is $N(0, V)$.
#
# We ask how much the outputs on new examples vary:
#
# $$V(\eta) = w_\eta^\top\, \Sigma\, w_\eta .$$
#
# The outputs on members do not vary. By (A1), each member's margin $y_i\,x_i^\top w$ is $y_i^2 = 1$.

# %% [markdown]
# ## The closed form
#
# **Statement.** For positive definite $G$, $\;w_G = G^{-1}X^\top (X G^{-1} X^\top)^{-1} y$.
#
# **Proof.** The Lagrangian is $w^\top G w - 2\lambda^\top (Xw - y)$. Its derivative in $w$ is zero where
# $Gw = X^\top\lambda$, so $w = G^{-1}X^\top\lambda$. Put that into $Xw = y$: $\lambda = (XG^{-1}X^\top)^{-1}y$. The
# objective is strictly convex, so this point is the only minimum. ∎
#
# SymPy solves the Lagrange equations for two examples of three features, with letters in the place of numbers, and
# compares. ($G$ is diagonal here. Nothing is lost: any $G$ becomes diagonal by a rotation of the axes.)

# %%
x = sp.Matrix(2, 3, sp.symbols("x_11 x_12 x_13 x_21 x_22 x_23"))
y = sp.Matrix(sp.symbols("y_1 y_2"))
g = sp.diag(*sp.symbols("g_1:4", positive=True))
w, multipliers = sp.Matrix(sp.symbols("w_1:4")), sp.Matrix(sp.symbols("lambda_1:3"))
lagrangian = (w.T * g * w - 2 * multipliers.T * (x * w - y))[0]
unknown = [*w, *multipliers]
solution = sp.linear_eq_to_matrix([sp.diff(lagrangian, u) for u in unknown], unknown)
closed = g.inv() * x.T * (x * g.inv() * x.T).inv() * y
gap = (solution[0].LUsolve(solution[1])[:3, :] - closed).applyfunc(sp.factor)
assert gap == sp.zeros(3, 1)
show_text("Solution of the Lagrange equations minus the closed form:")
display(gap.T)

# %% [markdown]
# In NumPy the interpolator takes two lines. The library reaches the same by factorizations that lose fewer digits.


# %%
def interpolator(x, y, g):
    """argmin w'Gw subject to Xw = y: [d]."""
    a = np.linalg.solve(g, x.T)  # G^-1 X'
    return a @ np.linalg.solve(x @ a, y)


def spectrum(kind, d):
    """Eigenvalues of Σ, largest first, [d] with sum d: isotropic, power law (1/i), spiked (a tenth hold 90%)."""
    rank = np.arange(1, d + 1)
    spikes = np.where(rank <= max(1, d // 10), 81.0, 1.0)
    values = {"isotropic": np.ones(d), "power law": 1 / rank, "spiked": spikes}[kind]
    return d * values / values.sum()


values = spectrum("power law", 100)
x, y = interpolation.draw(25, values, seed=run.seed + 2)
g = np.eye(100) + 4 * np.diag(values)
np.testing.assert_allclose(x @ interpolator(x, y, g), y)
np.testing.assert_allclose(interpolator(x, y, g), interpolation.minimum_norm(x, y, g), rtol=1e-6, atol=1e-9)

# %% [markdown]
# ## Theorem 1: contraction
#
# **Statement.** Under (A1) to (A3), $V(\eta)$ never increases with $\eta$. For every $\eta > 0$ it is *strictly*
# below $V(0)$, unless $N^\top \Sigma\, w_0 = 0$, where the columns of $N$ are a basis of the null space of $X$. In
# that case $w_\eta = w_0$ for all $\eta$, and nothing moves.
#
# **Proof.** $w_\eta$ is the minimum of its own objective, and $w_0$ of its own:
#
# $$\lVert w_\eta\rVert^2 + \eta\,V(\eta) \;\le\; \lVert w_0\rVert^2 + \eta\,V(0), \qquad
# \lVert w_0\rVert^2 \;\le\; \lVert w_\eta\rVert^2 .$$
#
# Add the two: $\eta\,V(\eta) \le \eta\,V(0)$. Equality needs equality in both, and then $w_\eta = w_0$, because $w_0$
# is the only minimum. This happens exactly if $w_0$ also minimizes the new objective along all directions in which it
# may move: $N^\top(I + \eta\Sigma)\,w_0 = \eta\,N^\top\Sigma\,w_0 = 0$ (as $N^\top w_0 = 0$). ∎
#
# (For $0 < \eta_1 < \eta_2$ the same exchange gives $V(\eta_2) \le V(\eta_1)$.) The proof does not use (A4) or (A5),
# and takes no limit: $\Sigma$ may be any semi-definite matrix. But $V$ is the variance on new examples only if
# $\Sigma$ is their covariance.

# %% [markdown]
# ### How much: the spectral formula
#
# **Statement.** Let $N$ be orthonormal, $S = N^\top\Sigma N = E\,\mathrm{diag}(s)\,E^\top$ and
# $b = E^\top N^\top \Sigma\,w_0$. Then
#
# $$V(\eta) = w_0^\top\Sigma\,w_0 - \sum_i b_i^2\,\frac{\eta\,(2 + \eta s_i)}{(1+\eta s_i)^2}, \qquad
# V'(\eta) = -2\sum_i \frac{b_i^2}{(1+\eta s_i)^3}, \qquad
# V(\infty) = w_0^\top\Sigma\,w_0 - \sum_{s_i > 0} \frac{b_i^2}{s_i} .$$
#
# **Proof.** Every interpolator is $w_0 + N z$ with a free $z$. As $N^\top w_0 = 0$, the objective is
# $\lVert w_0\rVert^2 + \lVert z\rVert^2 + \eta\,(w_0+Nz)^\top\Sigma\,(w_0+Nz)$, and its derivative in $z$ is zero
# where $(I + \eta S)\,z = -\eta\,N^\top\Sigma\,w_0$. In the eigenvectors of $S$, $z_i = -t_i b_i$ with
# $t_i = \eta/(1+\eta s_i)$. Then $V = w_0^\top\Sigma w_0 - 2\sum t_i b_i^2 + \sum s_i t_i^2 b_i^2$, and
# $t(2 - st) = \eta(2+\eta s)/(1+\eta s)^2$. For the slope use $dt/d\eta = (1+\eta s)^{-2}$. Where $s_i = 0$, also
# $b_i = 0$, because $\Sigma$ is semi-definite. So $\Sigma$ may be singular, and the limit $\eta\to\infty$ exists. ∎
#
# In NumPy, for a full matrix $\Sigma$ in ever more dimensions. The formula needs one eigendecomposition for all
# $\eta$; the interpolator is solved anew for each. Formula, library and solved interpolators agree.


# %%
def variance_formula(x, y, sigma, etas):
    """V by the spectral formula, at every eta."""
    w0, null, eta = interpolator(x, y, np.eye(len(sigma))), null_space(x), np.array(etas)[:, None]
    s, e = np.linalg.eigh(null.T @ sigma @ null)
    b = e.T @ null.T @ sigma @ w0
    return w0 @ sigma @ w0 - np.sum(b**2 * eta * (2 + eta * s) / (1 + eta * s) ** 2, axis=1)


for d in (20, 100, 400) if run.preset == "tiny" else (20, 200, 1000):
    x, y = interpolation.draw(d // 2, np.ones(d), seed=d)
    root, grid = np.random.default_rng(d).normal(size=(d, d)) / np.sqrt(np.arange(1, d + 1)), (0, 0.1, 1, 10, 100)
    sigma = root @ root.T
    solved = [w @ sigma @ w for w in (interpolator(x, y, np.eye(d) + eta * sigma) for eta in grid)]
    library = interpolation.contraction(interpolation.spectral(x, y, sigma), grid)
    np.testing.assert_allclose(library, solved, rtol=1e-6)
    np.testing.assert_allclose(variance_formula(x, y, sigma, grid), solved, rtol=1e-6)
    show_text(f"d = {d}: the largest relative error is {np.abs(library / solved - 1).max():.1e}.")

# %% [markdown]
# In symbols, for small $(n, d)$. The axes are chosen along the rows of $X$ and the eigenvectors of $S$, so $w_0$ has
# zeros after its first $n$ entries; $\Sigma$ is otherwise general. ($X = (I\;\,0)$ is no loss: interpolating $y$ by
# $X$ is the same as interpolating $R^{-1}y$ by $R^{-1}X$, for any invertible $R$.)

# %%
eta = sp.symbols("eta", nonnegative=True)


def inverted(m):
    return m.adjugate() / m.det()  # Matrix.inv first asks whether m is singular: a quarter of this cell's time


def symbolic_gaps(n, d):
    """V from the closed form minus the spectral formula, and the formula's slope minus the stated one."""
    w0, s = sp.symbols(f"w_1:{n + 1}", real=True), sp.symbols(f"s_1:{d - n + 1}", positive=True)
    a = sp.Matrix(n, n, lambda i, j: sp.Symbol(f"a_{min(i, j)}{max(i, j)}", real=True))
    c = sp.Matrix(n, d - n, lambda i, j: sp.Symbol(f"c_{i}{j}", real=True))
    sigma, x = sp.BlockMatrix([[a, c], [c.T, sp.diag(*s)]]).as_explicit(), sp.eye(n).row_join(sp.zeros(n, d - n))
    inverse, w0 = inverted(sp.eye(d) + eta * sigma), sp.Matrix(w0)
    w, pairs = inverse * x.T * inverted(x * inverse * x.T) * w0, list(zip(c.T * w0, s, strict=True))
    formula = (w0.T * a * w0)[0] - sum(b**2 * eta * (2 + eta * s) / (1 + eta * s) ** 2 for b, s in pairs)
    slope = -2 * sum(b**2 / (1 + eta * s) ** 3 for b, s in pairs)
    return sp.factor((w.T * sigma * w)[0] - formula), sp.factor(sp.diff(formula, eta) - slope)


for size in ((1, 2), (1, 3), (2, 3)):
    assert symbolic_gaps(*size) == (0, 0)
    show_text(f"(n, d) = {size}: the closed form equals the spectral formula, and its slope the stated one.")

# %% [markdown]
# **Illustration.** One problem, with a quarter as many examples as features. Left: $V(\eta)$, with one $\eta$ marked.
# Right: what that does to the margins. In a live notebook with ipywidgets, a slider moves $\eta$.

# %%
path = interpolation.spectral(*interpolation.draw(25, values, seed=run.seed + 2), np.diag(values))
grid = np.linspace(0, 20, 201)
curve = interpolation.contraction(path, grid)


def picture(eta=4.0):
    """V(eta), and the margins of non-members beside the members' 1."""
    v = float(interpolation.contraction(path, eta))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    left.plot(grid, curve, lw=2)
    left.plot(eta, v, "o", ms=9)
    left.set(xlabel=r"$\eta$", ylabel=r"$V(\eta)$", ylim=(0, None))
    margin = np.linspace(-3.5, 3.5, 701) * np.sqrt(curve[0])
    for label, variance, line in (("non-members, $\\eta = 0$", curve[0], "-"), (rf"$\eta = {eta:.3g}$", v, "--")):
        density = np.exp(-(margin**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        (drawn,) = right.plot(margin, density, line, lw=2, label=label)
        right.fill_between(margin, density, where=margin >= 1, color=drawn.get_color(), alpha=0.25)
    right.axvline(1, color="0.2", lw=2.5, label="members: all at 1")
    right.set(xlabel=r"margin $y\,x^\top w$", ylabel="density", title="shaded: wrongly accused at threshold 1")
    right.legend(fontsize=9, loc="upper left")
    plt.close(figure)  # it is shown once, by what calls this
    return figure


still = figures.save(picture(), run, "contraction")
try:
    from ipywidgets import interact

    is_live = get_ipython().kernel._allow_stdin  # False in a headless run, where nobody could move a slider
except (ImportError, AttributeError):
    is_live = False
interact(picture, eta=(0.0, 20.0)) if is_live else display(still)

# %% [markdown]
# **How to read it.** The curve falls steeply at first and then flattens towards $V(\infty)$, the smallest variance of
# any interpolator. As the hill of non-members gets narrower, less of it lies beyond the members' line.

# %% [markdown]
# ## Theorem 2: the confidence attack
#
# **Statement.** Members have margin exactly 1 and non-members $N(\mu, V)$ (A5: $\mu = 0$). Of all rules "member if
# the margin is at least $t$", the best has $t = 1$. Its advantage, true minus false positive rate, is
#
# $$\mathrm{Adv}(V) = \Phi\!\left(\frac{1-\mu}{\sqrt V}\right).$$
#
# For $\mu < 1$ it *increases* as $V$ falls.
#
# **Proof.** A $t > 1$ finds no member. Any $t \le 1$ finds them all, and $t = 1$ accuses the fewest non-members:
# $P(N(\mu,V) \ge 1) = 1 - \Phi((1-\mu)/\sqrt V)$. SymPy gives the derivative:

# %%
v, mu = sp.symbols("V mu", positive=True)
advantage = (1 + sp.erf((1 - mu) / sp.sqrt(2 * v))) / 2
slope = -(1 - mu) * sp.exp(-((1 - mu) ** 2) / (2 * v)) / (2 * sp.sqrt(2 * sp.pi) * v ** sp.Rational(3, 2))
assert sp.simplify(sp.diff(advantage, v) - slope) == 0
display(sp.Eq(sp.Derivative(sp.Symbol("Adv"), v), slope))

# %% [markdown]
# It has the sign of $\mu - 1$: negative below 1, so a smaller $V$ gives a larger advantage. (For $\mu > 1$,
# non-members more confident than members, it is the reverse.) ∎
#
# **A caveat.** The theorem speaks of *thresholds*. All members sit at exactly 1, and a non-member does so with
# probability zero. So the rule "margin $= 1$" always wins, at every $\eta$, and contraction adds nothing. Which
# attacks are allowed decides the answer, which is why there is a third theorem.
#
# **Without (A5).** Let labels follow a teacher, $y = \mathrm{sign}(x^\top u)$ flipped with probability $p$, and let
# $x$ be Gaussian. The margin is then skew-normal, and the advantage is $\Phi(h) - 2(1-2p)\,T(h, \alpha)$ with
# $h = 1/\sqrt V$, Owen's function $T$, and $\alpha = r/\sqrt{1-r^2}$ for the correlation $r$ of $x^\top w$ and
# $x^\top u$. With $p = 1/2$ it is Theorem 2.


# %%
def teacher_advantage(w, sigma, teacher, noise):
    """TPR - FPR of "member if margin >= 1" for w [d] or [d, k]: members at 1, labels of a teacher for the others."""
    v = interpolation.variance(w, sigma)
    cosine = (sigma @ teacher) @ w / np.sqrt(v * interpolation.variance(teacher, sigma))
    slant, h = cosine / np.sqrt(np.maximum(1 - cosine**2, interpolation.EPS)), 1 / np.sqrt(v)
    # the margin is skew-normal (Azzalini 1985, eq. 1 and 9): Adv = Phi(h) - 2 (1 - 2 noise) T(h, slant)
    advantage = stats.norm.cdf(h) - 2 * (1 - 2 * noise) * owens_t(h, slant)
    flipped = noise * stats.skewnorm.cdf(h, -slant)
    np.testing.assert_allclose(advantage, (1 - noise) * stats.skewnorm.cdf(h, slant) + flipped, atol=1e-7)
    return advantage


# %% [markdown]
# ## Theorem 3: likelihood-ratio attacks
#
# **Setting.** LiRA looks at one example at a time: how do models trained *with* it answer, and how do those trained
# without it? Let these answers be $N(\mu_{in}, \sigma_{in}^2)$ and $N(\mu_{out}, \sigma_{out}^2)$. The best possible
# rule accuses where the first density is larger. Its advantage is the total variation distance of the two. With
# $\delta = |\mu_{in} - \mu_{out}|/\sigma_{in}$ and $r = \sigma_{out}/\sigma_{in}$, the densities cross where
# $(1-r^2)\,u^2 + 2\delta u + \delta^2 + 2r^2\log r = 0$, a quadratic (`interpolation.likelihood_ratio_advantage`).
#
# **Statement.** Does a smaller $\sigma_{out}$ raise the optimal advantage?
#
# 1. *IN is a point mass*, $\sigma_{in} = 0 < \sigma_{out}$: **never.** The advantage is already 1.
# 2. *Equal spreads*, $\sigma_{out} = \sigma_{in}$, $\delta > 0$: **yes.** (It is $2\Phi(\delta/2) - 1$ there. If both
#    spreads fall together, $\delta$ grows, and the advantage rises too.)
# 3. *OUT is narrower*, $\sigma_{out} < \sigma_{in}$: **always.**
# 4. *OUT is wider*, $\sigma_{out} > \sigma_{in}$: **if and only if** $h < m\tanh(m h)$, with $m = r\delta/(r^2-1)$
#    and $h = \sqrt{\delta^2 + 2(r^2-1)\log r}\,/(r^2-1)$. In particular never if $\delta^2 \le 2\log r$: then OUT is
#    a wide hill over IN's narrow one, and narrowing OUT makes the two more alike.
#
# **Proof.** The advantage is $\int_A (p_{in} - p_{out})$ over $A = \{p_{in} > p_{out}\}$. The integrand vanishes at
# the ends of $A$, so moving the ends changes nothing to first order. The derivative in $\sigma_{out}$ is therefore
# that of $-P_{out}(A)$ with $A$ fixed. Let the crossings be $z_1 < z_2$ in units of OUT. As
# $\partial_\sigma \Phi((u-\mu)/\sigma) = -z\,\varphi(z)/\sigma$, the derivative is $D/\sigma_{out}$ where $A$ lies
# between the crossings (OUT wider), and $-D/\sigma_{out}$ where it lies outside (OUT narrower), with
# $D = z_2\varphi(z_2) - z_1\varphi(z_1)$.
#
# *OUT narrower:* OUT's centre lies between the crossings, so $z_1 < 0 < z_2$ and $D > 0$: the slope is negative.
# *Equal:* there is one crossing, at $z = \delta/2$, and the slope is
# $-\tfrac{\delta}{2}\varphi(\tfrac{\delta}{2})/\sigma_{out} < 0$. *OUT wider:* the crossings are $m \mp h$. If
# $m \le h$ then $z_1 \le 0 < z_2$ and $D > 0$; that is $\delta^2 \le 2\log r$. Else $D < 0$ means
# $z_2/z_1 < e^{(z_2^2-z_1^2)/2}$, that is $\log\frac{m+h}{m-h} = 2\,\mathrm{artanh}(h/m) < 2mh$. ∎
#
# We compare the stated region with the slope on a grid, and draw the map.

# %%
delta, r = np.meshgrid(np.linspace(0.01, 4.5, 181), np.geomspace(0.25, 8, 180))
slope = r * interpolation.likelihood_ratio_advantage(delta, 1, 0, r)[1]
wider = r > 1
m = (r * delta)[wider] / (r[wider] ** 2 - 1)
h = np.sqrt(delta[wider] ** 2 + 2 * (r[wider] ** 2 - 1) * np.log(r[wider])) / (r[wider] ** 2 - 1)
assert (slope[~wider] < 0).all()
agree = ((slope[wider] < 0) == (h < m * np.tanh(m * h))).mean()
show_text(f"Where OUT is wider, slope and stated region agree at {agree:.2%} of {wider.sum()} points.")

# %%
figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
most = np.abs(slope).max()
mesh = axis.pcolormesh(delta, r, slope, cmap="PuOr_r", vmin=-most, vmax=most, shading="gouraud", rasterized=True)
axis.contour(delta, r, slope, [0], colors="black", linewidths=2)
axis.axhline(1, color="0.3", lw=1, linestyle="--")
for x_text, y_text, word in ((3.4, 0.42, "raises"), (0.72, 5.2, "lowers")):
    box = dict(facecolor="white", alpha=0.85, linewidth=0)
    axis.text(x_text, y_text, f"a smaller OUT spread\n{word} the advantage", ha="center", bbox=box, fontsize=10)
axis.set(yscale="log", xlabel=r"$|\mu_{in}-\mu_{out}|\,/\,\sigma_{in}$", ylabel=r"$\sigma_{out}\,/\,\sigma_{in}$")
axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"], minor=False)
axis.minorticks_off()
figure.colorbar(mesh, label=r"slope of the advantage in $\log\,\sigma_{out}$")
figures.save(figure, run, "regions")

# %% [markdown]
# **How to read it.** Below the dashed line OUT is narrower, and contraction always helps the attacker. Above it, it
# helps to the right of the black curve and *hurts* to the left. So "outputs on non-members vary less" does not by
# itself mean "LiRA gains": it depends on where an example lies in this map. For small $\sigma_{in}$ (far up) the rule
# is simple: narrowing OUT helps if and only if IN's peak is more than one $\sigma_{out}$ away.

# %% [markdown]
# ## Monte Carlo: our own attacks on interpolators
#
# **Claim.** Real attacks achieve what the closed forms say: a learned threshold gains as in Theorem 2, and LiRA
# always wins.
#
# **Method.** As with networks, there is one pool, many models are trained on random halves of it in complementary
# pairs, and each example is a member of half of them. But here a model is a minimum $G_\eta$-norm interpolator,
# solved exactly, for all $\eta$ at once. We hand its margins to the attacks of the other notebooks in the place of $\phi$. We vary three
# things, one at a time, around a power-law spectrum, $n/d = 0.5$ and random labels (label noise 0.5): the spectrum,
# $n/d$, and the noise in labels that follow a random teacher.

# %%
d, n_simulated = (100, 32) if run.preset == "tiny" else (300, 48)  # features, and models of each setting
etas = [0.0, 0.3, 1.0, 3.0, 10.0]
names = [f"eta={eta:g}" for eta in etas]
last = names[-1]


def simulate(kind, share, noise):
    """One setting: margins [etas, M, N], membership [M, N], and V and the threshold's advantage by theory [etas]."""
    values, teacher = spectrum(kind, d), np.random.default_rng(run.seed).normal(size=d)
    sigma = np.diag(values)
    x, y = interpolation.draw(2 * round(share * d), values, teacher, noise, run.seed + 1)
    member = membership(Recipe(seed=run.seed), len(y), range(n_simulated))
    with threadpool_limits(1), ThreadPoolExecutor() as pool:  # small matrices gain nothing from more than one thread
        paths = list(pool.map(lambda half: interpolation.spectral(x[half], y[half], sigma), member))
    w = np.array([[interpolation.weights(path, eta) for path in paths] for eta in etas])  # [etas, M, d]
    v = (w**2 @ values).mean(1)  # w'Σw, Σ is diagonal
    advantage = [teacher_advantage(one.T, sigma, teacher, noise).mean() for one in w]
    return y * (w @ x.T), member, v, np.array(advantage)


# %% [markdown]
# We measure the variance of the outputs on non-members as a ratio to $\eta = 0$, and the advantage of two attacks:
# `confidence` (a learned threshold, cross-fitted) and `lira` (log likelihood ratio above 0). Each measurement stands
# beside its closed form; for LiRA that is 1, by the first case of Theorem 3. Intervals treat models and examples as
# two crossed samples. Differences from $\eta = 0$ are paired: the halves are the same at every $\eta$.


# %%
def advantages(margins, member, attack, threshold, metric, theory):
    """Advantage of an attack at every eta and its change from eta = 0; column `predicted` is the closed form."""
    scores = {name: attack(m) for name, m in zip(names, margins, strict=True)}
    frame = intervals.table(scores, member, fprs=(), threshold=threshold)
    frame = frame[frame.metric == "advantage"].assign(metric=metric, x=lambda f: f.optimizer.str[4:].astype(float))
    theory = frame.optimizer.map(dict(zip(names, theory, strict=True)))
    return frame.assign(predicted=theory.where(frame.baseline == ""))


def ratio(values, reference):
    """Ratio of the means of two matrices of influence values, paired: an Estimate, made on the log scale."""
    return intervals.Estimate(*np.exp(intervals.estimate(intervals.log_ratio_influence_values(values, reference))))


def measure(margins, member, v, advantage):
    """All rows of one setting."""
    squares = [intervals.ratio_influence_values(m**2, ~member) for m in margins]
    ratios = [
        intervals.row("variance_ratio", ratio(s, squares[0]), optimizer=name, baseline="", predicted=closed)
        for name, s, closed in zip(names, squares, v / v[0], strict=True)
    ]
    threshold = advantages(margins, member, lambda m: m, None, "advantage_confidence", advantage)
    lira = advantages(margins, member, partial(shadow.lira, member=member), 0.0, "advantage_lira", np.ones(len(v)))
    return pd.concat([pd.DataFrame(ratios[1:]), threshold, lira], ignore_index=True)


def record(frame, metric, **about):
    """Keep the rows, and the closed form of one metric as rows of their own."""
    closed = frame[(frame.metric == metric) & frame.predicted.notna()]
    closed = closed.assign(metric=f"{metric}_predicted", value=closed.predicted, ci_low=np.nan, ci_high=np.nan)
    results.add(pd.concat([frame, closed]), n_models=n_simulated, **about)


# %%
varied = {
    "spectrum": [("isotropic", 0.5, 0.5), ("spiked", 0.5, 0.5), ("power law", 0.5, 0.5)],
    "n/d": [("power law", share, 0.5) for share in (0.25, 0.5, 0.8)],
    "label noise": [("power law", 0.5, noise) for noise in (0.0, 0.2, 0.5)],
}
worlds = {setting: simulate(*setting) for settings in varied.values() for setting in settings}
tables = {setting: measure(*world) for setting, world in worlds.items()}
places = {s: f"spectrum={s[0]}, n/d={s[1]:g}, label noise={s[2]:g}" for s in worlds}
for setting, frame in tables.items():
    about = dict(coordinate=places[setting], n_examples=worlds[setting][1].shape[1])
    record(frame, "advantage_confidence", experiment="theorem: monte carlo", **about)


# %%
def draw(frame, xlabel, ylabels, even=True, **axes):
    """Values with intervals against x, a panel and a line per series; where `predicted` is given, it is the line."""
    same = len(set(ylabels.values())) == 1
    size = (4.4 * len(ylabels) + 1, 4.2)
    figure, panels = plt.subplots(1, len(ylabels), figsize=size, squeeze=False, sharey=same, layout="constrained")
    for axis, (panel, label) in zip(panels[0], ylabels.items(), strict=True):
        rows = frame[frame.panel == panel]
        ticks = np.unique(rows.x)
        for index, (name, part) in enumerate(rows.groupby("series", sort=False)):
            x = np.searchsorted(ticks, part.x) + 0.14 * (index - 1) if even else part.x
            is_point = "predicted" in part and part.predicted.notna().all()
            figures.error_bars(axis, x, part, index, name, **({"linestyle": ""} if is_point else {}))
            if is_point:
                axis.plot(x, part.predicted, color=figures.COLOURS[index])
        if even:
            axis.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
        axis.set(title=panel, xlabel=xlabel, ylabel=label, **axes)
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3 if even else 1)
    return figure


series = [
    tables[setting].assign(panel=panel, series=str(setting[place]))
    for place, (panel, settings) in enumerate(varied.items())
    for setting in settings
]
drawn = pd.concat(series).query("metric == 'advantage_confidence' and baseline == ''")
panels = dict.fromkeys(varied, "advantage of a threshold")
display(figures.save(draw(drawn, r"$\eta$", panels), run, "monte_carlo"))

every = pd.concat(tables.values())
every = every[every.predicted.notna()]
for metric, rows in every[every.metric != "advantage_lira"].groupby("metric"):
    inside = (rows.ci_low <= rows.predicted + 1e-9) & (rows.predicted - 1e-9 <= rows.ci_high)
    gap = (rows.value - rows.predicted).abs().max()
    show_text(f"`{metric}`: {inside.sum()} of {len(rows)} intervals hold the closed form; the largest gap is {gap:.3f}")

# %% [markdown]
# **How to read it.** Points are attacks with their intervals, lines are closed forms. The points of one series share
# their data, so their errors are correlated. A learned threshold ends midway between 1 and the next lower score that
# it has seen. It accuses slightly more than $t = 1$ would, so the points may lie a little low. The isotropic line is
# flat: there is nothing to contract.

# %%
for attack in ("confidence", "lira"):
    rows = [select(f, names[0], metric=f"advantage_{attack}", optimizer=last) for f in tables.values()]
    changes = [sign(row) for row in rows]
    said = f"gains in {changes.count(1)}, loses in {changes.count(-1)} of {len(changes)} settings"
    show_text(f"From {names[0]} to {last}, `{attack}` {said}, and does not detectably change in the others.")
sizes = every[every.metric == "advantage_lira"].value
show_text(f"LiRA's advantage over all settings and eta: from {sizes.min():.4f} to {sizes.max():.4f}.")

# %% [markdown]
# **How to read it.** LiRA shows Theorem 3's first case. With exact interpolation IN is a point mass, LiRA finds it,
# and contraction has nothing to add. So the story "variance falls, therefore the attack gains" holds for thresholds.
# It cannot explain a gain *of LiRA* in a model that interpolates exactly.

# %% [markdown]
# ### When IN has a spread: does contraction help LiRA?
#
# **Claim.** It depends on where the examples lie in the map above.
#
# **Method.** The same interpolators, but we release the margin plus Gaussian noise of standard deviation 0.5. So
# $\sigma_{in} = 0.5$, and $\sigma_{out}$ is larger. With few examples for each feature, non-members lie within about
# one $\sigma_{out}$ of 0, and IN's peak at 1 is far out. With many examples the interpolator strains, $\sigma_{out}$
# is large, and the OUT hill covers IN's peak. The prediction is Theorem 3 for each example, with the mean and
# variance of its noiseless OUT margins, averaged over the examples.

# %%
spread, noisy = 0.5, {}


def theorem_3(margin, member):
    """For each example, from the noiseless margins at one eta: the advantage [N] and its slope in OUT's spread [N]."""
    out = np.where(member, np.nan, margin)
    # OUT_i ~ N(mean_i, var_i + spread^2),  IN ~ N(1, spread^2)
    sd_out = np.sqrt(np.nanvar(out, 0, ddof=1) + spread**2)
    return interpolation.likelihood_ratio_advantage(1.0, spread, np.nanmean(out, 0), sd_out)


for setting in varied["n/d"]:
    margins, member = worlds[setting][:2]
    noise = spread * np.random.default_rng(run.seed + 3).normal(size=member.shape)
    theory = np.array([theorem_3(m, member)[0].mean() for m in margins])
    lira = partial(shadow.lira, member=member)
    frame = advantages(margins + noise, member, lira, 0.0, "advantage_lira", theory)
    about = dict(coordinate=f"noise={spread:g}, {places[setting]}", n_examples=member.shape[1])
    record(frame, "advantage_lira", experiment="theorem: noisy release", **about)
    noisy[f"n/d = {setting[1]:g}"] = frame
    helped = (theorem_3(margins[0], member)[1] < 0).mean()
    change = select(frame, names[0], metric="advantage_lira", optimizer=last)
    measured = number(change)
    show_text(f"n/d = {setting[1]:g}: a smaller spread should help at {helped:.0%} of the examples.")
    show_text(f"LiRA's advantage changes by {measured}; predicted is {theory[-1] - theory[0]:+.3f}.")

# %%
drawn = pd.concat(frame.assign(series=name, panel="released with noise") for name, frame in noisy.items())
panels = {"released with noise": "advantage of LiRA"}
figures.save(draw(drawn[drawn.baseline == ""], r"$\eta$", panels), run, "released")

# %% [markdown]
# **How to read it.** This is the same contraction in the same model. Where a line rises, it helps LiRA; where it
# falls, it *protects*. Contraction also moves the OUT means a little, which the prediction includes. LiRA estimates
# its means and variances from few shadow models, so it stays below the best attacker of the prediction.

# %% [markdown]
# ## Where the theorem stops
#
# ### (A4): whose curvature?
#
# **Claim.** With the *empirical* curvature $\Sigma = X^\top X/n$ nothing contracts: $\Sigma w_0$ lies in the row
# space of $X$, so $N^\top\Sigma w_0 = 0$. With $\Sigma = cI$ nothing contracts either: $N^\top w_0 = 0$. Yet the
# empirical curvature is the only one that an optimizer sees.
#
# **Method.** We solve the interpolator with each $\Sigma$ and compute the variance of its outputs under the true
# covariance.

# %%
values = spectrum("power law", 200)
truth, (x, y) = np.diag(values), interpolation.draw(100, values, seed=run.seed + 4)
curvatures = {"empirical": x.T @ x / len(x), "isotropic": 3 * np.eye(200), "population": truth}
v0, rows = interpolation.variance(interpolation.minimum_norm(x, y), truth), []
for name, sigma in curvatures.items():
    for eta in etas[1:]:
        w = interpolation.minimum_norm(x, y, np.eye(200) + eta * sigma)
        rows.append((f"case={name} curvature", f"eta={eta:g}", interpolation.variance(w, truth) / v0))
limits = pd.DataFrame(rows, columns=["coordinate", "optimizer", "value"])
results.add(limits.assign(metric="variance_ratio"), experiment="theorem: limits", n_models=1, n_examples=len(x))
moves = (limits.value - 1).abs().groupby(limits.coordinate.str[5:]).max()
for name, move in moves.items():
    show_text(f"With the {name} the variance changes by at most {move:.1e} of itself.")

# %% [markdown]
# ### (A2): gradient descent and SAM never get there
#
# **Claim.** Gradient descent on a linear model, started at zero, ends at $w_0$, and **so does SAM**. The gradient of
# a squared loss, at *any* point, is $X^\top(\text{residuals})/n$: a combination of the rows of $X$. SAM takes the
# gradient at a perturbed point, which changes the residuals and not the rows. So both stay in the row space of $X$,
# and the only interpolator there is $w_0$. $G_\eta$ is a *model* of sharpness-awareness; it is not what SAM does to a
# linear model.
#
# Nor could flatness choose between the interpolators. The Hessian of the squared loss of a linear model is $X^\top X/n$,
# which does not depend on $w$: all of its minima are equally flat.
#
# **Method.** We run both. We measure the part of $w$ outside the row space and the distance from $w_0$, each relative
# to $\lVert w_0\rVert$.


# %%
def gradient_descent(x, y, rho=0.0, steps=4000):
    """w after full-batch descent on |Xw - y|^2 / 2n from w = 0, with a cosine learning rate. rho > 0: SAM."""
    w, top = np.zeros(x.shape[1]), np.linalg.norm(x, 2) ** 2 / len(x)
    for t in range(steps):
        g = x.T @ (x @ w - y) / len(x)
        if rho:
            # g_SAM = grad L(w + rho g / |g|)
            g = x.T @ (x @ (w + rho * g / (np.linalg.norm(g) + 1e-30)) - y) / len(x)
        # w <- w - lr_t g,  lr_t = (1 + cos(pi t / T)) / (2 largest curvature)
        w = w - (1 + np.cos(np.pi * t / steps)) / (2 * top) * g
    return w


few_values = spectrum("power law", 60)
x, y = interpolation.draw(20, few_values, seed=run.seed + 5)
w0, rows = interpolation.minimum_norm(x, y), []
for name, radius in (("gd", 0.0), ("sam", 0.3)):
    w = gradient_descent(x, y, radius, steps=20_000)
    outside = w - np.linalg.pinv(x) @ (x @ w)
    for metric, gap in (("row_space_residual", outside), ("distance_to_minimum_norm", w - w0)):
        rows.append((name, metric, np.linalg.norm(gap) / np.linalg.norm(w0)))
        show_text(f"{name}: {metric.replace('_', ' ')} {rows[-1][-1]:.1e}.")
descent = pd.DataFrame(rows, columns=["optimizer", "metric", "value"]).assign(coordinate="case=linear model from zero")
results.add(descent, experiment="theorem: limits", n_models=1, n_examples=len(x))

# %% [markdown]
# ### So what would make $G_\eta$ appear?
#
# **Claim.** Three things do. Each brings in something that the training examples do not contain.
#
# - *An explicit penalty with held-out curvature*: $\Sigma$ is estimated from many unlabelled new examples.
# - *Input noise with weight decay*: noise of covariance $\lambda\eta\,\Sigma$ on the inputs adds
#   $\lambda\eta\,w^\top\Sigma w$ to the loss, and weight decay adds $\lambda\lVert w\rVert^2$. As $\lambda\to 0$ the
#   two together choose among interpolators by $G_\eta$.
# - *Random features*: gradient descent from zero on $z = Ax$, with rows of $A$ drawn from $N(0, G_\eta^{-1})$, ends
#   at the minimum 2-norm *in $z$*. That is nearly the minimum $G_\eta$-norm in $x$: the architecture acts as the
#   penalty.
#
# **Method.** We run each on the problem of the last section, with $\eta = 3$.

# %%
sigma, eta, rng = np.diag(few_values), 3.0, np.random.default_rng(run.seed + 6)
fresh = interpolation.draw(6000, few_values, seed=run.seed + 7)[0]
held_out = fresh.T @ fresh / len(fresh)
ways = {"held-out curvature": interpolation.minimum_norm(x, y, np.eye(60) + eta * held_out)}

decay, noise = 1e-4, rng.normal(size=(200, *x.shape)) * np.sqrt(few_values)
noise = np.sqrt(decay * eta) * np.concatenate([noise, -noise]).reshape(-1, 60)
copies, labels = np.tile(x, (400, 1)) + noise, np.tile(y, 400)
# argmin mean (y - (x + e)'w)^2 + decay |w|^2
gram = copies.T @ copies / len(copies) + decay * np.eye(60)
ways["input noise"] = np.linalg.solve(gram, copies.T @ labels / len(copies))

features = rng.normal(size=(3000, 60)) / np.sqrt(3000 * (1 + eta * few_values))
ways["random features"] = features.T @ gradient_descent(x @ features.T, y)

# %%
target, v0 = interpolation.minimum_norm(x, y, np.eye(60) + eta * sigma), interpolation.variance(w0, sigma)
ratios = {name: interpolation.variance(w, sigma) / v0 for name, w in ways.items()}
rows = [dict(coordinate=f"case={name}", value=ratio) for name, ratio in ratios.items()]
appears = pd.DataFrame(rows).assign(metric="variance_ratio", optimizer=f"eta={eta:g}")
results.add(appears, experiment="theorem: where it appears", n_models=1, n_examples=len(x))
show_text(f"By the theorem, V({eta:g})/V(0) = {interpolation.variance(target, sigma) / v0:.3f}.")
for name, w in ways.items():
    left = np.linalg.norm(w - target) / np.linalg.norm(w0 - target)
    show_text(f"{name}: V ratio {ratios[name]:.3f}; {left:.2f} of the way from w_0 to w_eta is left.")

# %% [markdown]
# ## Beyond linear: do the outputs of real networks contract?
#
# **Claim.** SAM's outputs on non-members vary less than SGD's, and fewer of its non-members are extremely confident.
#
# **Method.** The ensembles of the first notebook. We measure the variance of $\phi$ and of $p_y$ in three ways: over
# all examples that a model did not see; within each class; and for one example over the models that did not see it.
# The variance over members stands beside. Extremes are the share of non-members with $p_y > 0.99$, and the share
# above the median member of the same model: those that a threshold would wrongly accuse.

# %%
KINDS = ("across_examples", "within_class", "across_models")


def certain(ensemble):
    """Influence values [M, N] of the share of non-members with p_y > 0.99."""
    return intervals.ratio_influence_values(compare.signal(ensemble, "confidence") > 0.99, ~np.array(ensemble.member))


def above_median(ensemble):
    """Influence values [M, N] of the share of non-members above the median phi of the model's members."""
    phi, member = compare.signal(ensemble, "phi"), np.array(ensemble.member)
    median = np.nanmedian(np.where(member, phi, np.nan), axis=1, keepdims=True)
    return intervals.ratio_influence_values(phi > median, ~member)


def outputs(ensembles):
    """Variances of non-members in three meanings, of members, and the shares of extreme non-members."""
    frames = [compare.variances(ensembles, KINDS), compare.variances(ensembles, KINDS[:1], members=True)]
    frames.append(compare.compared(ensembles, certain, "nonmember_share_above_0.99", rate=True))
    frames.append(compare.compared(ensembles, above_median, "nonmember_share_above_member_median", rate=True))
    return pd.concat(frames, ignore_index=True)


ensembles = run.ensembles("main")
found = outputs(ensembles)
results.add(found, n_models=len(ensembles[baseline].ids))
show_table(found)

# %%
words = ("higher", "lower", "not detectably different")
steps = found[(found.optimizer == treatment) & (found.baseline == baseline)]
steps = steps[~steps.metric.str.startswith("log_ratio")]
said = steps.metric.groupby([describe_sign(row, *words) for row in steps.itertuples()]).agg(joined)
for word, metrics in said.items():
    show_text(f"{treatment} against {baseline}, **{word}**: {metrics}.")

# %% [markdown]
# **How to read it.** A row `log_ratio_...` is the log of the ratio of the two variances: -0.1 says that one is about a
# tenth smaller. $\phi$ has no ceiling: whatever stretches all outputs raises its variance for members and
# non-members alike, so look at the two together. $p_y$ lies in $[0, 1]$. Its variance falls both when non-members are
# more uniformly right and when they are more uniformly unsure.

# %% [markdown]
# ### Against the radius
#
# **Claim.** If the radius $\rho$ plays the part of $\eta$, the variance falls as $\rho$ grows.
#
# **Method.** The radius sweep of the first notebook, radius 0 first. The table has the paired differences from radius
# 0.

# %%
radius_sweep = run.ensembles("radius sweep")
without = str(radius_sweep[0.0].recipe.optimizer)
by_radius = {(treatment if rho else without, rho): e for rho, e in radius_sweep.items()}
radius_frame = compare.split_labels(outputs(by_radius), "rho")
results.add(radius_frame, experiment="radius sweep", n_models=len(radius_sweep[0.0].ids))
steps = radius_frame[radius_frame.baseline != ""]
show_table(steps.assign(rho=steps.rho.map("{:g}".format)), across=["rho"])

# %%
levels = radius_frame[radius_frame.baseline == ""]
parts = levels.metric.str.extract(r"^(member|nonmember)_variance_(phi|confidence)_(.*)$")
series = parts[0].str.replace("non", "non-") + "s, " + parts[2].str.replace("_", " ")
drawn = levels.assign(x=levels.rho, series=series, panel=parts[1]).dropna(subset="panel")
panels = {"phi": r"variance of $\phi$", "confidence": "variance of $p_y$"}
figures.save(draw(drawn, r"$\rho$", panels, even=False, yscale="log"), run, "variance_and_radius")

# %%
for metric, rows in steps[steps.metric.str.match("(non)?member_.*across_examples")].groupby("metric", sort=False):
    each = [f"{describe_sign(row, *words)} at {row.rho:g}" for row in rows.itertuples()]
    show_text(f"`{metric}`, against radius 0: {', '.join(each)}.")

# %% [markdown]
# **How to read it.** Compare non-members with members at the same radius. If the variance falls for both, the whole
# scale shrinks. That is not contraction, and thresholds do not notice it.

# %% [markdown]
# ## The theorem in a network's own features
#
# **Claim.** With a linear model of the network, the theorem predicts how far SAM's outputs should contract.
#
# **Method.** Near its trained weights a network *is* linear in them. The features of an example are the gradient of
# its $\phi$ in the weights (the tangent space; of a large network, of its last layers). There are far more weights
# than examples, so (A1) holds. We take some of a model's members as $X$, ask for the margin 1 on all of them, and
# take $\Sigma$ as the covariance of the features of some of its non-members. The closed form then says how the
# variance contracts on *those*; on *other* non-members we compute it. We compare this with the measured ratio of the
# variances of $\phi$ on non-members, SAM over SGD.

# %%
n_fit = 100  # members to fit; twice as many non-members, every other one behind Σ
tangent_etas = np.array([0, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])  # in units of the mean curvature


def tangent_features(ensemble, k, chosen, most=100_000):
    """Gradient of phi in the weights of model k (of the last layers, while they are at most `most`): [chosen, P]."""
    net, weights, buffers = ensemble.weights(k)
    sizes = np.cumsum([w.numel() for w in reversed(weights.values())])
    some = {n: weights[n].detach().requires_grad_() for n in list(reversed(weights))[: max(1, np.sum(sizes <= most))]}
    rows = []
    for x, y in zip(torch.from_numpy(inputs(run.dataset)[0][chosen]), run.dataset.y[chosen], strict=True):
        logits = functional_call(net, (weights | some, buffers), (x[None],))[0]
        # phi = z_y - logsumexp_{j != y} z_j
        phi = logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).logsumexp(0)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(phi, list(some.values()))]))
    return torch.stack(rows).double().numpy()


def tangent_path(ensemble, index):
    """V(eta)/V(0) of one network's tangent model, on the non-members behind Σ and on others: [2, etas]."""
    inside, outside = (np.flatnonzero(ensemble.member[index] == side) for side in (True, False))
    inside, outside = inside[:n_fit], outside[: 2 * n_fit]
    features = tangent_features(ensemble, int(ensemble.ids[index]), np.concatenate([inside, outside]))
    # J' = QR: the rows of R' are the same features in coordinates of their span
    z = qr(features.T, mode="r")[0][: len(features)].T
    x, behind, others = z[: len(inside)], z[len(inside) :: 2], z[len(inside) + 1 :: 2]
    r, order = qr(x.T, mode="r", pivoting=True)
    size = np.abs(np.diag(r))
    x = x[np.sort(order[: np.sum(size > 1e-10 * size[0])])]  # (A1): the rows are independent
    sigma, new = np.cov(behind, rowvar=False), np.cov(others, rowvar=False)
    path, scaled = interpolation.spectral(x, np.ones(len(x)), sigma), tangent_etas * len(sigma) / np.trace(sigma)
    on_others = [interpolation.variance(interpolation.weights(path, eta), new) for eta in scaled]
    return interpolation.contraction(path, scaled) / path.v0, np.array(on_others) / on_others[0]


kept = [i for i, k in enumerate(ensembles[baseline].ids[:8]) if k < KEEP_WEIGHTS]
paths = np.array([tangent_path(ensembles[baseline], i) for i in kept])  # [models, 2, etas]

# %%
sides, of_pairs = ("behind Σ", "others"), paths.reshape(-1, 2, *paths.shape[1:]).mean(1)
tangent = [  # means and intervals on the log scale: no ratio falls below 0
    intervals.row("variance_ratio", intervals.Estimate(*np.exp(found)), x=eta, series=name)
    for side, name in enumerate(sides)
    for j, eta in enumerate(tangent_etas)
    for found in [intervals.estimate(np.log(of_pairs[None, :, side, j]), examples_only=True)]
]
tangent = pd.DataFrame(tangent).assign(optimizer=lambda f: f.x.map("eta={:g}".format))
predicted = tangent[(tangent.series == sides[1]) & (tangent.x > 0)]
variances = {name: compare.variance_influence_values(e, "phi", "across_examples") for name, e in ensembles.items()}
real = ratio(variances[treatment], variances[baseline])
measured = pd.DataFrame([intervals.row("variance_ratio", real, optimizer=treatment, baseline=baseline)])
for kind, frame, n in (("predicted", predicted, len(kept)), ("measured", measured, len(ensembles[baseline].ids))):
    results.add(frame, experiment="theorem: feature space", coordinate=f"kind={kind}", n_models=n)

# %%
across = measured.merge(pd.DataFrame({"x": tangent_etas}), how="cross")
across = across.assign(series="measured")
drawn = pd.concat([tangent, across]).assign(panel="tangent features")
panels = {"tangent features": "ratio of variances"}
figures.save(draw(drawn, r"$\eta$", panels), run, "features")

# %% [markdown]
# **How to read it.** The falling lines are predictions, on the non-members behind $\Sigma$ and on others. They differ
# because $\Sigma$ is overfitted: a few non-members do not determine so many directions. The measured ratio is one
# number, drawn across. It can meet the prediction for some $\eta$, or for none.

# %%
nearest = predicted.loc[(predicted.value - real.value).abs().idxmin()]
lowest = predicted.loc[predicted.value.idxmin()]
if real.low > max(1, predicted.ci_high.max()):
    said = "**No agreement.** The variance grew; by the theorem it cannot grow at any eta."
elif real.high < predicted.ci_low.min():
    said = "**No agreement.** The variance fell further than at any eta here."
elif real.low <= 1 <= real.high:
    said = "**Undecided.** The measured interval holds 1, which is no contraction at all."
else:
    said = f"**No conflict.** The prediction moves away from 1 as eta grows, and is nearest at {nearest.optimizer}."
show_text(f"{said} Measured {number(measured.iloc[0])}; lowest prediction {number(lowest)}.")

# %% [markdown]
# If one number agrees with a curve that has a free $\eta$, that is weak evidence. If the sign disagrees, that is
# strong evidence: the theorem predicts contraction for *every* $\eta > 0$.

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above.

# %%
ratios = sorted((select(f, metric="variance_ratio", optimizer=last).value, places[s]) for s, f in tables.items())
said = " and ".join(f"by {1 - ratio:.0%} ({place})" for ratio, place in (ratios[0], ratios[-1]))
show_text(f"**The theorem, in its setting.** At {last} the variance contracts {said}: the most and the least.")
said = ", ".join(f"{move:.1g} with the {name}" for name, move in moves.items())
show_text(f"**Its premises.** The variance changes at most by {said}.")
distance = select(descent, metric="distance_to_minimum_norm", optimizer="sam").value
show_text(f"**SAM on a linear model** ends within {distance:.1g} of the minimum 2-norm, where gradient descent ends.")
than = ("more than", "less than", "no differently from")
for name in ("phi", "confidence"):
    metrics = [f"{who}_variance_{name}_across_examples" for who in ("nonmember", "member")]
    out, inside = (describe_sign(select(found, baseline, metric=m, optimizer=treatment), *than) for m in metrics)
    show_text(f"**Real networks, {name}.** On non-members {treatment} varies {out} {baseline}, on members {inside} it.")
out = select(found, baseline, metric="nonmember_variance_phi_across_examples", optimizer=treatment)
show_text(
    "**What an engineer should do.** Do not infer privacy from flatness or from the spread of the outputs. Here the "
    f"outputs of {treatment} on non-members vary {describe_sign(out, *than)} those of {baseline}; what a model leaks is "
    "measured by the attacks of notebook 1, so run these on the model that you ship. If you want the contraction of the "
    "theorem, penalize curvature on held-out examples: no optimizer that sees the training data alone can."
)
show_text(f"All numbers of this run: `{results.path.name}` beside this notebook's copy.")

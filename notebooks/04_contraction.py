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
# Why would a flatter minimum leak *more*? *Membership Privacy Risks of Sharpness-Aware Minimization* (arXiv 2310.00488)
# answers with a theorem about linear models. Among all models that fit their training data exactly, one that is also
# asked to be insensitive gives outputs on *new* examples that vary less. Members all sit at the same output, so the
# less the others vary, the more the members stand out.
#
# This notebook states that theorem, proves it, and runs it: first on paper and in symbols, then with our own attacks
# on linear models, then where it stops to hold, and last on the real networks of the earlier notebooks.
#
# *(This file comes in two copies with the same cells. Edit the `.py`; `make sync` writes the `.ipynb`.)*

# %% [markdown]
# ## Setting up
#
# The first cell finds the library, whether the notebook runs from the root or from `notebooks/`, and notes which
# names exist, so that a misspelt parameter is seen as one.

# %%
import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in (Path.cwd(), Path.cwd().parent) if (p / "lib" / "study" / "settings.py").exists()]

from lib.study import settings

before = {*globals(), "before"}

# %% [markdown]
# Parameters left at `None` are filled in by the preset. All are checked in the next cell, before any training.

# %% tags=["parameters"]
preset: str = "default"  # tiny, default, small, fast, paper
dataset: str = "digits"  # digits, subclasses, cifar10, cifar100, eyepacs, purchase100, texas100, folder, npz
data: str = None  # path, where the data set needs one
arch: str = None  # mlp, cnn, resnet18, wrn28_2, vgg16_bn, ... or your own as package.module:name
optimizers: str = None  # comma-separated, the first is the baseline: "sgd,sam,looksam"
rho: float = None  # radius of SAM's neighbourhood
n_models: int = None  # models per optimizer, an even number
n_examples: int = None  # size of the pool, an even number
subset: float = None  # share of the pool that each model trains on
epochs: int = None  # epochs of the main comparison
batch_size: int = None  # examples per step
lr: float = None  # peak learning rate
weight_decay: float = None  # weight decay
augment: bool = None  # flips and shifts, in training and as queries of the attacks
ema: float = None  # decay of the moving average of the weights that is kept; 0: the last weights
seed: int = None  # seed of everything
device: str = None  # auto, cpu, cuda, mps
engine: str = None  # local, or ray (a cluster at RAY_ADDRESS, or this machine's own)
gpus: float = None  # GPUs that a Ray task asks for
store: str = None  # folder of the trained ensembles (default: store/)
out: str = None  # folder of this run's results (default: outputs/<dataset>/)

# %%
run = settings.notebook_settings(globals(), before)

import numpy as np
import pandas as pd
import sympy as sp
from IPython.display import display
from scipy.linalg import qr
from threadpoolctl import threadpool_limits

from lib.analysis import compare, flatness, interpolation
from lib.attacks import intervals, shadow
from lib.attacks.signals import parallel
from lib.study import figures
from lib.study.results import Results
from lib.study.text import describe_sign, difference, number, show_table, show_text, sign
from lib.training.ensemble import KEEP_WEIGHTS
from lib.training.recipe import Recipe, membership

# %%
figures.style()
d, n_simulated = (100, 32) if run.preset == "tiny" else (300, 48)  # features and models of the simulations
etas = [0.0, 0.3, 1.0, 3.0, 10.0]
baseline, treatment = run.names[0], run.treatment
pair, than = f"{treatment}-{baseline}", ("more than", "less than", "no differently from")
results = Results("04_contraction", run)
show_text(run.describe())

# %% [markdown]
# ## The setting
#
# A linear model $x \mapsto x^\top w$ is trained on $n$ examples: rows of $X$, $[n, d]$, with labels $y_i = \pm 1$. The
# assumptions have names, so that we can come back to them one by one.
#
# - **(A1) Interpolation.** There are more features than examples, $n < d$; the rows of $X$ are independent; and training
#   ends at a $w$ with $Xw = y$ exactly. Infinitely many do: $w$ can move freely in the null space of $X$.
# - **(A2) The optimizer picks by a norm.** It ends at $w_G = \arg\min\; w^\top G w$ subject to $Xw = y$.
# - **(A3) What sharpness-awareness changes is $G$.** Plain training has $G_0 = I$. A sharpness-aware optimizer has
#   $G_\eta = I + \eta\,\Sigma$ with $\eta > 0$: it also minds how much the outputs react.
# - **(A4) $\Sigma$ is the population's curvature**, the covariance $\mathbb E\,xx^\top$ of *new* examples.
# - **(A5) Gaussian margins**, for the attacks: a non-member's margin $y\,x^\top w$ is $N(0, V)$.

# %% [markdown]
# The quantity of interest is the variance of the outputs on new examples,
#
# $$V(\eta) = w_\eta^\top\, \Sigma\, w_\eta .$$
#
# Members have none: by (A1), each member's margin $y_i\,x_i^\top w$ is $y_i^2 = 1$.

# %% [markdown]
# ## The closed form
#
# **Statement.** For positive definite $G$, $\;w_G = G^{-1}X^\top (X G^{-1} X^\top)^{-1} y$.
#
# **Proof.** The Lagrangian is $w^\top G w - 2\lambda^\top (Xw - y)$. Its derivative in $w$ is zero where
# $Gw = X^\top\lambda$, so $w = G^{-1}X^\top\lambda$. Put that into $Xw = y$: $\lambda = (XG^{-1}X^\top)^{-1}y$. The
# objective is strictly convex, so this point is the only minimum. ∎
#
# SymPy solves the Lagrange equations for two examples of three features, with letters for all the numbers, and
# compares. ($G$ is diagonal here, which costs nothing: turn the axes.)

# %%
x = sp.Matrix(2, 3, sp.symbols("x_11 x_12 x_13 x_21 x_22 x_23"))
y = sp.Matrix(sp.symbols("y_1 y_2"))
g = sp.diag(*sp.symbols("g_1:4", positive=True))
w, multipliers = sp.Matrix(sp.symbols("w_1:4")), sp.Matrix(sp.symbols("lambda_1:3"))
lagrangian = (w.T * g * w - 2 * multipliers.T * (x * w - y))[0]
unknown = [*w, *multipliers]
matrix, right = sp.linear_eq_to_matrix([sp.diff(lagrangian, u) for u in unknown], unknown)
solved = matrix.LUsolve(right)[:3, :]
closed = g.inv() * x.T * (x * g.inv() * x.T).inv() * y
left_over = sp.simplify(solved - closed)
assert left_over == sp.zeros(3, 1)
show_text(f"Solution of the Lagrange equations minus the closed form: ${sp.latex(left_over.T)}$.")

# %% [markdown]
# ## Theorem 1: contraction
#
# **Statement.** Under (A1) to (A3), $V(\eta)$ never increases with $\eta$; and for every $\eta > 0$ it is *strictly*
# below $V(0)$, unless $N^\top \Sigma\, w_0 = 0$, where the columns of $N$ are a basis of the null space of $X$. In that
# case $w_\eta = w_0$ for all $\eta$, and nothing moves at all.
#
# **Proof, in two lines.** $w_\eta$ is the best at its own objective, and $w_0$ at its own:
#
# $$\lVert w_\eta\rVert^2 + \eta\,V(\eta) \;\le\; \lVert w_0\rVert^2 + \eta\,V(0), \qquad
# \lVert w_0\rVert^2 \;\le\; \lVert w_\eta\rVert^2 .$$
#
# Add them: $\eta\,V(\eta) \le \eta\,V(0)$. Equality needs equality in both, and as $w_0$ is the only minimum,
# $w_\eta = w_0$. Exactly when does that happen? When $w_0$ is already a minimum of the new objective along all the
# directions in which it may move: $N^\top(I + \eta\Sigma)\,w_0 = \eta\,N^\top\Sigma\,w_0 = 0$ (as $N^\top w_0 = 0$). ∎
#
# (For $0 < \eta_1 < \eta_2$ the same exchange gives $V(\eta_2) \le V(\eta_1)$.) Note what was *not* used: nothing
# Gaussian, no limit, not even (A4). $\Sigma$ may be any semi-definite matrix. But $V$ is the variance on new examples
# only if $\Sigma$ is theirs.

# %% [markdown]
# ### How much: the spectral formula
#
# **Statement.** Let $N$ be orthonormal, $S = N^\top\Sigma N = E\,\mathrm{diag}(s)\,E^\top$ and
# $b = E^\top N^\top \Sigma\,w_0$. Then
#
# $$V(\eta) = w_0^\top\Sigma\,w_0 - \sum_i b_i^2\,\frac{\eta\,(2 + \eta s_i)}{(1+\eta s_i)^2}, \qquad
# V'(\eta) = -2\sum_i \frac{b_i^2}{(1+\eta s_i)^3}, \qquad
# V(\infty) = w_0^\top\Sigma\,w_0 - \sum_{s_i > 0} \frac{b_i^2}{s_i} .$$

# %% [markdown]
# **Proof.** Every interpolator is $w_0 + N z$ with a free $z$. As $N^\top w_0 = 0$, the objective is
# $\lVert w_0\rVert^2 + \lVert z\rVert^2 + \eta\,(w_0+Nz)^\top\Sigma\,(w_0+Nz)$, and its derivative in $z$ is zero where
# $(I + \eta S)\,z = -\eta\,N^\top\Sigma\,w_0$. In the eigenvectors of $S$, $z_i = -t_i b_i$ with
# $t_i = \eta/(1+\eta s_i)$. Then $V = w_0^\top\Sigma w_0 - 2\sum t_i b_i^2 + \sum s_i t_i^2 b_i^2$, and
# $t(2 - st) = \eta(2+\eta s)/(1+\eta s)^2$. For the slope use $dt/d\eta = (1+\eta s)^{-2}$. Where $s_i = 0$, $b_i = 0$
# too, because $\Sigma$ is semi-definite; so $\Sigma$ may be singular and the limit $\eta\to\infty$ exists. ∎
#
# In symbols, for small $(n, d)$. The axes are chosen along the rows of $X$ and the eigenvectors of $S$, so that $w_0$ has its
# letters first and zeros after; nothing else is special about $\Sigma$.

# %%
eta = sp.symbols("eta", nonnegative=True)


def left_over(n, d):
    """V from the closed form minus the spectral formula, and its slope minus the stated one."""
    w0, s = sp.symbols(f"w_1:{n + 1}", real=True), sp.symbols(f"s_1:{d - n + 1}", positive=True)
    a = sp.Matrix(n, n, lambda i, j: sp.Symbol(f"a_{min(i, j)}{max(i, j)}", real=True))
    c = sp.Matrix(n, d - n, lambda i, j: sp.Symbol(f"c_{i}{j}", real=True))
    sigma, x = sp.BlockMatrix([[a, c], [c.T, sp.diag(*s)]]).as_explicit(), sp.eye(n).row_join(sp.zeros(n, d - n))
    inverse = (sp.eye(d) + eta * sigma).inv()
    w, b = inverse * x.T * (x * inverse * x.T).inv() * sp.Matrix(w0), c.T * sp.Matrix(w0)
    formula = (sp.Matrix([w0]) * a * sp.Matrix(w0))[0]
    formula -= sum(bi**2 * eta * (2 + eta * si) / (1 + eta * si) ** 2 for bi, si in zip(b, s, strict=True))
    slope = -2 * sum(bi**2 / (1 + eta * si) ** 3 for bi, si in zip(b, s, strict=True))
    return sp.simplify((w.T * sigma * w)[0] - formula), sp.simplify(sp.diff(formula, eta) - slope)


# %% [markdown]
# ($X = (I\;\,0)$ is no loss: interpolating $y$ by $X$ is interpolating $R^{-1}y$ by $R^{-1}X$ for any invertible $R$.)

# %%
for size in ((1, 2), (1, 3), (2, 3)):
    assert left_over(*size) == (0, 0)
    show_text(
        "(n, d) = {}: closed form minus spectral formula ${}$, slope minus the stated one ${}$.".format(
            size, *left_over(*size)
        )
    )

# %% [markdown]
# And in numbers, in many dimensions: the constrained problem solved anew for each $\eta$, against the formula, which
# needs one eigendecomposition for all of them. $\Sigma$ is a full matrix, with eigenvalues that fall as $1/i$.


# %%
def formula_error(d):
    """Largest relative gap between the solved interpolators' variances and the spectral formula."""
    values, is_kth_step = (
        interpolation.spectrum("power law", d),
        np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0],
    )
    x, y = interpolation.draw(d // 2, values, seed=d)
    sigma = is_kth_step * values @ is_kth_step.T
    sigma, x = (sigma + sigma.T) / 2, x @ is_kth_step.T
    path, grid = interpolation.spectral(x, y, sigma), (0, 0.1, 1, 10, 100)
    w = [interpolation.minimum_norm(x, y, interpolation.penalty(sigma, eta)) for eta in grid]
    solved = np.array([interpolation.variance(one, sigma) for one in w])
    return np.abs(solved / interpolation.contraction(path, grid)[0] - 1).max()


checked = {d: formula_error(d) for d in ((20, 100, 400) if run.preset == "tiny" else (20, 200, 2000))}
show_text("Largest relative error: " + ", ".join(f"{error:.1e} at d = {d}" for d, error in checked.items()) + ".")

# %% [markdown]
# **Illustration.** One problem, a quarter as many examples as features. Left, $V(\eta)$ with one $\eta$ marked. Right, what
# that does to the margins. Where ipywidgets is installed and the notebook is open in a browser, a slider moves $\eta$;
# otherwise the picture stands still.

# %%
values = interpolation.spectrum("power law", 100)
path = interpolation.spectral(*interpolation.draw(25, values, seed=run.seed + 2), np.diag(values))
grid = np.linspace(0, 20, 201)


def picture(eta=4.0):
    return figures.contraction(
        grid, interpolation.contraction(path, grid)[0], eta, interpolation.contraction(path, eta)[0]
    )


still = figures.save(picture(), run, "contraction")
if not figures.slider(picture, eta=(0.0, 20.0, 4.0)):
    display(still)

# %% [markdown]
# **How to read it.** The curve falls steeply at first and has a floor: $V(\infty)$, the smallest variance of any
# interpolator. As the hill of non-members gets narrower, less of it lies beyond the members' line.

# %% [markdown]
# ## Theorem 2: the confidence attack
#
# **Statement.** Members have margin exactly 1 and non-members $N(\mu, V)$ (A5: $\mu = 0$). Of all rules "member if the
# margin is at least $t$", the best has $t = 1$, and its advantage, true minus false positive rate, is
#
# $$\mathrm{Adv}(V) = \Phi\!\left(\frac{1-\mu}{\sqrt V}\right).$$
#
# For $\mu < 1$ it *increases* as $V$ falls.
#
# **Proof.** A $t > 1$ finds no member. Any $t \le 1$ finds them all, and accuses the fewest non-members at $t = 1$:
# $P(N(\mu,V) \ge 1) = 1 - \Phi((1-\mu)/\sqrt V)$. The derivative, by SymPy:

# %%
v, mu = sp.symbols("V mu", positive=True)
advantage = (1 + sp.erf((1 - mu) / sp.sqrt(2 * v))) / 2
slope = -(1 - mu) * sp.exp(-((1 - mu) ** 2) / (2 * v)) / (2 * sp.sqrt(2 * sp.pi) * v ** sp.Rational(3, 2))
assert sp.simplify(sp.diff(advantage, v) - slope) == 0
display(sp.Eq(sp.Derivative(sp.Symbol("Adv"), v), slope))

# %% [markdown]
# It has the sign of $\mu - 1$: negative below 1, so a smaller $V$ gives a larger advantage. (For $\mu > 1$, non-members
# more confident than members, it would be the reverse.) ∎
#
# **An honest remark.** The theorem speaks of *thresholds*. Members are a point mass at 1, and non-members hit exactly 1
# with probability zero. So whoever tests "margin $= 1$?" wins always, at every $\eta$, and contraction adds nothing.
# The family of attacks matters: that is why there is a third theorem.
#
# **Beyond (A5).** If labels follow a teacher, $y = \mathrm{sign}(x^\top u)$ flipped with probability $p$, and $x$ is
# Gaussian, the margin is skew-normal instead, and the advantage is
# $\Phi(h) - 2(1-2p)\,T(h, \alpha)$ with $h = 1/\sqrt V$, Owen's function $T$, and $\alpha = r/\sqrt{1-r^2}$ for the
# correlation $r$ of $x^\top w$ and $x^\top u$ (`interpolation.teacher_advantage`). With $p = 1/2$ it is Theorem 2.

# %% [markdown]
# ## Theorem 3: likelihood-ratio attacks
#
# **Setting.** LiRA looks at one example at a time: how do models trained *with* it answer, and how do those trained
# without? Let these be $N(\mu_{in}, \sigma_{in}^2)$ and $N(\mu_{out}, \sigma_{out}^2)$. The best rule of all accuses
# where the first density is the larger, and its advantage is their total variation distance. With
# $\delta = |\mu_{in} - \mu_{out}|/\sigma_{in}$ and $r = \sigma_{out}/\sigma_{in}$, the densities cross where
# $(1-r^2)\,u^2 + 2\delta u + \delta^2 + 2r^2\log r = 0$, a quadratic (`interpolation.likelihood_ratio_advantage`).

# %% [markdown]
# **Statement.** Does a smaller $\sigma_{out}$ raise the optimal advantage?
#
# 1. *IN a point mass*, $\sigma_{in} = 0 < \sigma_{out}$: **never.** The advantage is 1 already.
# 2. *Equal spreads*, $\sigma_{out} = \sigma_{in}$, $\delta > 0$: **yes.** (It is $2\Phi(\delta/2) - 1$ there. If both
#    spreads fall together, $\delta$ grows, and again it rises.)
# 3. *OUT narrower*, $\sigma_{out} < \sigma_{in}$: **always.**
# 4. *OUT wider*, $\sigma_{out} > \sigma_{in}$: **if and only if** $h < m\tanh(m h)$, with
#    $m = r\delta/(r^2-1)$ and $h = \sqrt{\delta^2 + 2(r^2-1)\log r}\,/(r^2-1)$. In particular never if
#    $\delta^2 \le 2\log r$: then OUT is a wide hill over IN's narrow one, and narrowing OUT makes the two more alike.

# %% [markdown]
# **Proof.** The advantage is $\int_A (p_{in} - p_{out})$ over $A = \{p_{in} > p_{out}\}$. The integrand vanishes at the
# ends of $A$, so moving them changes nothing to first order, and the derivative in $\sigma_{out}$ is that of
# $-P_{out}(A)$ with $A$ fixed. Let the crossings be $z_1 < z_2$ in units of OUT. As
# $\partial_\sigma \Phi((u-\mu)/\sigma) = -z\,\varphi(z)/\sigma$, the derivative is $D/\sigma_{out}$ where $A$ lies
# between the crossings (OUT wider), and $-D/\sigma_{out}$ where it lies outside (OUT narrower), with
# $D = z_2\varphi(z_2) - z_1\varphi(z_1)$.
#
# *OUT narrower:* OUT's centre lies between the crossings, so $z_1 < 0 < z_2$ and $D > 0$: negative slope.
# *Equal:* one crossing, at $z = \delta/2$, and slope $-\tfrac{\delta}{2}\varphi(\tfrac{\delta}{2})/\sigma_{out} < 0$.
# *OUT wider:* the crossings are $m \mp h$. If $m \le h$ then $z_1 \le 0 < z_2$ and $D > 0$; that is
# $\delta^2 \le 2\log r$. Else $D < 0$ means $z_2/z_1 < e^{(z_2^2-z_1^2)/2}$, that is
# $\log\frac{m+h}{m-h} = 2\,\mathrm{artanh}(h/m) < 2mh$. ∎

# %%
delta, r = np.meshgrid(np.linspace(0.01, 4.5, 181), np.geomspace(0.25, 8, 180))
slope = r * interpolation.advantage_slope(delta, 1, 0, r)
wider = r > 1
m = (r * delta)[wider] / (r[wider] ** 2 - 1)
h = np.sqrt(delta[wider] ** 2 + 2 * (r[wider] ** 2 - 1) * np.log(r[wider])) / (r[wider] ** 2 - 1)
assert (slope[~wider] < 0).all()
agree = ((slope[wider] < 0) == (h < m * np.tanh(m * h))).mean()
display(figures.save(figures.advantage_regions(delta, r, slope), run, "regions"))
show_text(f"The slope's sign and the stated region agree at {agree:.2%} of {wider.sum()} points with OUT the wider.")

# %% [markdown]
# **How to read it.** Below the dashed line OUT is the narrower, and contraction always helps the attacker. Above it, it
# helps to the right of the black curve and *hurts* to the left. So "outputs of non-members vary less" does not
# by itself mean "LiRA gains": it depends on where an example stands in this map. For small $\sigma_{in}$
# (far up) the rule is simple: narrowing OUT helps if and only if IN's peak is more than one $\sigma_{out}$ away.

# %% [markdown]
# ## Monte Carlo: our own attacks on interpolators
#
# **Claim.** The closed forms are what an attack achieves: learned thresholds gain what Theorem 2 says, LiRA wins
# always.
#
# **How we test it.** Just as with networks: one pool, many models on random halves of it in complementary pairs,
# each example a member of half of them. But here a model is a minimum $G_\eta$-norm interpolator, solved exactly. We
# hand its margins to the attacks of the other notebooks in the place of $\phi$. Three things vary, one at a time, about a
# power-law spectrum, $n/d = 0.5$ and random labels (label noise 0.5): the spectrum, $n/d$, and the label noise about a
# random teacher.


# %%
def simulate(kind, share, noise):
    """Margins [etas, M, N] of interpolators of halves of one pool, members [M, N]; closed forms V and Adv, [etas]."""
    values, teacher = interpolation.spectrum(kind, d), np.random.default_rng(run.seed).normal(size=d)
    sigma = np.diag(values)
    x, y = interpolation.draw(2 * round(share * d), values, teacher, noise, run.seed + 1)
    member = membership(Recipe(seed=run.seed), len(y), range(n_simulated))
    penalties = [interpolation.penalty(sigma, eta) for eta in etas]
    with threadpool_limits(1):  # a model a thread: on matrices this small, more only get in each other's way
        w = [parallel(lambda m, g=g: interpolation.minimum_norm(x[m], y[m], g), member) for g in penalties]
    w = np.array(w)
    v = interpolation.variance(np.moveaxis(w, -1, 0).reshape(d, -1), sigma).reshape(w.shape[:2]).mean(1)
    return y * (w @ x.T), member, v, [interpolation.teacher_advantage(one.T, sigma, teacher, noise).mean() for one in w]


# %% [markdown]
# The measured quantities: the variance of the outputs on non-members, as a ratio to $\eta = 0$; and the advantage of the
# `confidence` attack (a learned threshold, cross-fitted) and of `lira` (log likelihood ratio above 0). Intervals treat
# models and examples as two crossed samples. Differences are paired: the same halves at every $\eta$.


# %%
def contracted(margins, member):
    """V(eta) / V(0) as measured on the non-members."""
    cells = [intervals.ratio_influence_values(m**2, ~member) for m in margins]
    rows = zip(etas[1:], (compare.ratio(c, cells[0]) for c in cells[1:]), strict=True)
    return pd.DataFrame([intervals.row("variance_ratio", e, optimizer=f"eta={eta:g}", x=eta) for eta, e in rows])


def leaked(margins, member, attack, threshold, name):
    """Advantage of one attack at every eta, and its differences from eta = 0."""
    scores = {f"eta={eta:g}": attack(m) for eta, m in zip(etas, margins, strict=True)}
    frame = intervals.table(scores, member, fprs=(), threshold=threshold)
    return frame[frame.metric == "advantage"].assign(
        metric=name, x=frame.optimizer.str[4:].str.split("-").str[0].astype(float)
    )


# %% [markdown]
# Beside each measurement goes its closed form. For LiRA that is 1, by the first case of Theorem 3.


# %%
def measured(margins, member, v, closed):
    """All rows of one simulated setting; column `predicted`: the closed form beside its measurement."""
    likelihood = leaked(margins, member, lambda m: shadow.lira(m, member), 0.0, "advantage_lira")
    threshold = leaked(margins, member, lambda m: m, None, "advantage_confidence")
    forms = {"variance_ratio": v / v[0], "advantage_confidence": closed, "advantage_lira": np.ones(len(v))}
    frame = pd.concat([contracted(margins, member), threshold, likelihood], ignore_index=True)
    at = {(m, f"eta={eta:g}"): value for m, form in forms.items() for eta, value in zip(etas, form, strict=True)}
    return frame.assign(predicted=[at.get(key, np.nan) for key in zip(frame.metric, frame.optimizer, strict=True)])


# %%
varied = {"spectrum": [("isotropic", 0.5, 0.5), ("spiked", 0.5, 0.5), ("power law", 0.5, 0.5)]}
varied["n/d"] = [("power law", share, 0.5) for share in (0.25, 0.5, 0.8)]
varied["label noise"] = [("power law", 0.5, noise) for noise in (0.0, 0.2, 0.5)]
worlds = {setting: simulate(*setting) for settings in varied.values() for setting in settings}
tables = {setting: measured(*world) for setting, world in worlds.items()}

# %% [markdown]
# Every setting's numbers are recorded; the closed form beside each is a row of its own.


# %%
def record(frame, metric, **about):
    """Add the rows of a frame, and the closed form beside `metric` as rows of their own."""
    results.add(frame, **about)
    closed = frame[(frame.metric == metric) & frame.predicted.notna()]
    closed = closed.assign(metric=f"{metric}_predicted", value=closed.predicted, ci_low=np.nan, ci_high=np.nan)
    results.add(closed, **about)


notes = {s: f"monte carlo, spectrum={s[0]}, n/d={s[1]:g}, label noise={s[2]:g}" for s in worlds}
for setting, frame in tables.items():
    about = dict(note=notes[setting], n_models=n_simulated, n_examples=worlds[setting][1].shape[1])
    record(frame, "advantage_confidence", **about)

# %%
long = [
    tables[setting].assign(panel=name, series=str(setting[place]))
    for place, (name, settings) in enumerate(varied.items())
    for setting in settings
]
single = pd.concat(long, ignore_index=True)
single = single[~single.optimizer.str.contains("-eta")]
frame = single[single.metric == "advantage_confidence"]
panels = dict.fromkeys(varied, "advantage of a threshold")
display(figures.save(figures.curves(frame, r"$\eta$", panels, levels=True), run, "monte_carlo"))

# %%
every = pd.concat(tables.values(), ignore_index=True)
every = every[every.predicted.notna()]
for metric in ("advantage_confidence", "variance_ratio"):
    rows = every[every.metric == metric]
    inside = (rows.ci_low <= rows.predicted + 1e-9) & (rows.predicted - 1e-9 <= rows.ci_high)
    gap = (rows.value - rows.predicted).abs().max()
    show_text(
        f"`{metric}`: {inside.sum()} of {len(rows)} intervals hold the closed form; the largest gap is {gap:.3f}."
    )

# %% [markdown]
# **How to read it.** Points are attacks with their intervals, lines are closed forms. Points of one series share their
# data, so they miss or hit together. A learned threshold ends up midway between 1 and the next lower score it has seen,
# so it accuses slightly more than $t = 1$ would, and the points may lie a little low. The isotropic line is flat: there
# is nothing to contract.

# %%
last = f"eta={etas[-1]:g}"
for name in ("confidence", "lira"):
    said = {1: [], -1: [], 0: []}
    for setting, frame in tables.items():
        row = frame[(frame.optimizer == f"{last}-eta=0") & (frame.metric == f"advantage_{name}")].iloc[0]
        said[sign(row)].append("/".join(map(str, setting)))
    words = [f"{word} in {len(said[s])}" for s, word in ((1, "gains"), (-1, "loses"), (0, "no detectable change"))]
    unmoved = f" (unmoved: {', '.join(said[0])})" if 0 < len(said[0]) < len(tables) else ""
    show_text(f"From eta = 0 to {etas[-1]:g}, `{name}`: {', '.join(words)} of {len(tables)} settings{unmoved}.")
sizes = every[every.metric == "advantage_lira"].value
show_text(f"LiRA's advantage over all settings and eta: from {sizes.min():.4f} to {sizes.max():.4f}.")

# %% [markdown]
# **How to read it.** That is Theorem 3's first case. With exact interpolation IN is a point mass, LiRA finds it, and
# contraction has nothing left to add. So the theorem's story, "variance falls, therefore the attack gains", holds for
# thresholds, but cannot be what explains a gain *of LiRA* in a model that interpolates exactly.

# %% [markdown]
# ### When IN has a spread: does contraction help LiRA?
#
# **Claim.** It depends on where the examples stand in the map above.
#
# **How we test it.** The same interpolators, but what is released is the margin plus Gaussian noise of standard
# deviation 0.5, so $\sigma_{in} = 0.5$ and $\sigma_{out}$ is larger. With few examples for each feature, non-members lie
# within one $\sigma_{out}$ or so of 0 and IN's peak at 1 is far out; with many, the interpolator strains, $\sigma_{out}$
# is large, and IN's peak is covered by the OUT hill. The prediction is Theorem 3 for each example, with the mean and
# variance of its noiseless OUT margins, averaged.

# %%
spread = 0.5


def theorem_3(margin, member, form=interpolation.likelihood_ratio_advantage):
    """Its advantage (or slope) for each example, from the noiseless margins of one eta: [N]."""
    out = np.where(member, np.nan, margin)
    # OUT_i ~ N(mean_i, var_i + spread^2),  IN ~ N(1, spread^2)
    return form(1.0, spread, np.nanmean(out, 0), np.sqrt(np.nanvar(out, 0, ddof=1) + spread**2))


# %%
def released(margins, member, *_):
    """LiRA's advantage on noisy margins at every eta, with Theorem 3's beside it."""
    noise = spread * np.random.default_rng(run.seed + 3).normal(size=member.shape)
    frame = leaked(margins + noise, member, lambda m: shadow.lira(m, member), 0.0, "advantage_lira")
    form = [theorem_3(m, member).mean() for m in margins]
    return frame.assign(predicted=frame.optimizer.map({f"eta={e:g}": f for e, f in zip(etas, form, strict=True)}))


# %%
noisy = {s: released(*worlds[s]) for s in varied["n/d"]}
for setting, frame in noisy.items():
    margins, member = worlds[setting][:2]
    note = f"released with noise {spread:g}, " + notes[setting].split(", ", 1)[1]
    record(frame, "advantage_lira", note=note, n_models=n_simulated, n_examples=member.shape[1])
    change, form = frame[frame.optimizer == f"{last}-eta=0"].iloc[0], frame.predicted.dropna()
    helped = (theorem_3(margins[0], member, interpolation.advantage_slope) < 0).mean()
    show_text(
        f"n/d = {setting[1]:g}: a smaller spread should help at {helped:.0%} of the examples. From eta = 0 to {etas[-1]:g} "
        f"LiRA's advantage changes by {number(change.value, change.ci_low, change.ci_high)}, "
        f"predicted {form.iloc[-1] - form.iloc[0]:+.3f}."
    )

# %%
frame = pd.concat(f.assign(series=f"n/d = {s[1]:g}", panel="released with noise") for s, f in noisy.items())
frame = frame[~frame.optimizer.str.contains("-eta")]
figures.save(
    figures.curves(frame, r"$\eta$", {"released with noise": "advantage of LiRA"}, levels=True), run, "released"
)

# %% [markdown]
# **How to read it.** The same contraction, in the same model: where a line rises it helps LiRA, where it falls it
# *protects*, whatever a threshold on the exact margins does. Contraction also moves the OUT means a
# little, which the prediction takes in. (LiRA estimates its means and variances from few
# shadows, so it stays below the best attacker of the prediction.)

# %% [markdown]
# ## Where the theorem stops
#
# ### (A4): whose curvature?
#
# **Claim.** If $\Sigma$ is the *empirical* $X^\top X/n$, nothing contracts: $\Sigma w_0$ lies in the row space of $X$, so
# $N^\top\Sigma w_0 = 0$. If $\Sigma = cI$, nothing does either: $N^\top w_0 = 0$. Yet the empirical curvature is the only
# one that an optimizer sees.
#
# **How we test it.** The interpolator solved with each, and the variance of its outputs under the true covariance.

# %%
values = interpolation.spectrum("power law", 200)
truth, (x, y) = np.diag(values), interpolation.draw(100, values, seed=run.seed + 4)
curvatures = {"empirical": x.T @ x / len(x), "isotropic": 3 * np.eye(200), "population": truth}
v0 = interpolation.variance(interpolation.minimum_norm(x, y), truth)
rows = []
for name, sigma in curvatures.items():
    for eta in etas[1:]:
        w = interpolation.minimum_norm(x, y, interpolation.penalty(sigma, eta))
        rows.append((f"limit: {name} curvature", f"eta={eta:g}", interpolation.variance(w, truth) / v0))
limits = pd.DataFrame(rows, columns=["note", "optimizer", "value"])
limits = limits.assign(metric="variance_ratio", ci_low=np.nan, ci_high=np.nan)
results.add(limits, n_models=1, n_examples=len(x))
for note, rows in limits.groupby("note", sort=False):
    show_text(f"{note}: the variance moves by at most {(rows.value - 1).abs().max():.1e} of itself.")

# %% [markdown]
# ### (A2): gradient descent and SAM never get there
#
# **Claim.** Gradient descent on a linear model started at zero ends at $w_0$, and **so does SAM**. The gradient of a
# squared loss, at *whatever* point it is taken, is $X^\top(\text{residuals})/n$: a combination of the rows of $X$. SAM takes
# it at a perturbed point, which changes the residuals and not the rows. So both stay in the row space of $X$, and the only
# interpolator there is $w_0$. $G_\eta$ is a *model* of sharpness-awareness; it is not what SAM does to a linear model.
#
# **How we test it.** We run both and measure the part of $w$ outside the row space, and the distance from $w_0$, each
# relative to $\lVert w_0\rVert$.

# %%
few_values = interpolation.spectrum("power law", 60)
x, y = interpolation.draw(20, few_values, seed=run.seed + 5)
w0, rows = interpolation.minimum_norm(x, y), []
for name, rho in (("gd", 0.0), ("sam", 0.3)):
    w = interpolation.gradient_descent(x, y, rho, steps=20_000)
    outside = w - np.linalg.pinv(x) @ (x @ w)
    for metric, gap in (("row_space_residual", outside), ("distance_to_minimum_norm", w - w0)):
        rows.append((name, metric, np.linalg.norm(gap) / np.linalg.norm(w0)))
        show_text(f"{name}: {metric.replace('_', ' ')} {rows[-1][-1]:.1e}.")
descent = pd.DataFrame(rows, columns=["optimizer", "metric", "value"])
results.add(
    descent.assign(ci_low=np.nan, ci_high=np.nan), note="limit: linear model from zero", n_models=1, n_examples=20
)

# %% [markdown]
# ### So what would make $G_\eta$ appear?
#
# **Claim.** Three things do, and each brings in something that the training examples do not contain.
#
# - *An explicit penalty with held-out curvature*: $\Sigma$ estimated from many unlabelled new examples.
# - *Input noise with weight decay*: noise of covariance $\lambda\eta\,\Sigma$ on the inputs adds $\lambda\eta\,w^\top\Sigma w$ to
#   the loss, weight decay adds $\lambda\lVert w\rVert^2$; as $\lambda\to 0$ the two choose among interpolators by $G_\eta$.
# - *Random features*: gradient descent from zero on $z = Ax$, with rows of $A$ drawn from $N(0, G_\eta^{-1})$, ends at the
#   minimum 2-norm *in $z$*, which is nearly the minimum $G_\eta$-norm in $x$. The architecture is the penalty.
#
# **How we test it.** Each is run on the problem of the last section, with $\eta = 3$.

# %%
sigma, eta, rng = np.diag(few_values), 3.0, np.random.default_rng(run.seed + 6)
target = interpolation.minimum_norm(x, y, interpolation.penalty(sigma, eta))
fresh = interpolation.draw(6000, few_values, seed=run.seed + 7)[0]
ways = {
    "held-out curvature": interpolation.minimum_norm(x, y, interpolation.penalty(fresh.T @ fresh / len(fresh), eta))
}
decay, noise = 1e-4, rng.normal(size=(200, *x.shape)) * np.sqrt(few_values)
noise = np.sqrt(1e-4 * eta) * np.concatenate([noise, -noise]).reshape(-1, 60)
copies, labels = np.tile(x, (400, 1)) + noise, np.tile(y, 400)
# argmin mean (y - (x + e)'w)^2 + decay |w|^2
ways["input noise"] = np.linalg.solve(
    copies.T @ copies / len(copies) + decay * np.eye(60), copies.T @ labels / len(copies)
)
features = rng.normal(size=(3000, 60)) / np.sqrt(3000 * (1 + eta * few_values))
ways["random features"] = features.T @ interpolation.gradient_descent(x @ features.T, y)

# %%
v0 = interpolation.variance(w0, sigma)
rows = [
    ("variance_ratio", interpolation.variance(w, sigma) / v0, f"appears: {name}", "eta=3") for name, w in ways.items()
]
appears = pd.DataFrame(rows, columns=["metric", "value", "note", "optimizer"]).assign(ci_low=np.nan, ci_high=np.nan)
results.add(appears, n_models=1, n_examples=20)
show_text(f"By the theorem, V(3)/V(0) = {interpolation.variance(target, sigma) / v0:.3f}.")
for (name, w), ratio in zip(ways.items(), appears.value, strict=True):
    left = np.linalg.norm(w - target) / np.linalg.norm(w0 - target)
    show_text(
        f"{name}: V ratio {ratio:.3f}; it ends at {left:.2f} of the distance from w_0 to w_eta (0 is w_eta itself)."
    )

# %% [markdown]
# ## Beyond linear: do the outputs of real networks contract?
#
# **Claim.** SAM's outputs on non-members vary less than SGD's, and its extreme confident non-members are fewer.
#
# **How we test it.** The ensembles of the first notebook. Variance is measured of $\phi$ and of $p_y$; over all the
# examples that a model did not see, and within each class; for one example over the models that did not see
# it; and over the members, beside it. Extremes: the share of non-members with $p_y > 0.99$, and the share
# above the median member of the same model, the ones that a threshold would wrongly accuse.

# %%
KINDS = ("across_examples", "within_class", "across_models")


def outputs(ensembles):
    """Variances of non-members in three meanings, of members, and the shares of extreme non-members."""
    members = compare.variances(ensembles, KINDS[:1], members=True)
    return pd.concat([compare.variances(ensembles, KINDS), members, compare.extremes(ensembles)], ignore_index=True)


ensembles = compare.keep_common_models({name: run.train(name) for name in run.names})
found = outputs(ensembles)
results.add(found, n_models=len(ensembles[baseline].ids))
show_table(found)

# %%
words = ("higher", "lower", "not detectably different")
for word in words:
    metrics_so = [m for m in found.metric.unique() if describe_sign(difference(found, m, pair), *words) == word]
    show_text(f"{treatment} against {baseline}, {word}: {', '.join(f'`{m}`' for m in metrics_so) or 'none'}.")

# %% [markdown]
# **How to read it.** $\phi$ has no ceiling: whatever stretches all the outputs raises its variance for members and
# non-members alike, so look at the two together. $p_y$ lies in $[0, 1]$; its variance falls both when
# non-members are more uniformly right and when they are more uniformly unsure.

# %% [markdown]
# ### Against the radius
#
# **Claim.** If the radius $\rho$ plays the part of $\eta$, the variance falls as $\rho$ grows.
#
# **How we test it.** The ensembles of the first notebook's section on dose and response, radius 0 first.

# %%
without = run.recipe(treatment).optimizer.base_name
radius_sweep = {0.0: run.train(without, run.sweep)}
radius_sweep |= {dose: run.train(treatment, run.sweep, rho=dose) for dose in run.radius_sweep(treatment)}
radius_sweep = compare.keep_common_models(radius_sweep, essential=[0.0])
radius_frame = compare.radius_table(radius_sweep, treatment, without, table=outputs)
results.add(radius_frame, note="dose and response", n_models=len(radius_sweep[0.0].ids))

# %%
levels = radius_frame[~radius_frame.optimizer.str.contains("-")]
parts = levels.metric.str.extract(r"^(member|nonmember)_variance_(phi|confidence)_(.*)$")
names = {"phi": r"$\phi$", "confidence": "$p_y$"}
series = parts[0].str.replace("non", "non-") + "s, " + parts[2].str.replace("_", " ")
frame = levels.assign(x=levels.rho, panel=parts[1].map(names), series=series).dropna(subset=["panel"])
panels = {panel: f"variance of {panel}" for panel in names.values()}
figures.save(figures.curves(frame, r"$\rho$", panels, yscale="log"), run, "variance_and_radius")

# %% [markdown]
# The paired differences from radius 0, a radius a column.

# %%
steps = radius_frame[radius_frame.optimizer == f"{treatment}-{without}"]
show_table(steps, across=["rho"])
for metric in (m for m in steps.metric.unique() if m.endswith("across_examples")):
    each = [f"{describe_sign(row, *words)} at {row.rho:g}" for row in steps[steps.metric == metric].itertuples()]
    show_text(f"`{metric}`, against radius 0: {', '.join(each)}.")

# %% [markdown]
# **How to read it.** Compare non-members with members at the same radius: a variance that falls for both is a
# shrinking of the whole scale, which contraction does not mean and thresholds do not notice.

# %% [markdown]
# ## The theorem in a network's own features
#
# **Claim.** What is missing between the theorem and a network is a linear model of the network. With one, the theorem
# predicts how far SAM's outputs should contract.
#
# **How we test it.** Near its trained weights a network *is* linear in them: the features of an example are the
# gradient of its $\phi$ in the weights (the tangent space; of a large network, the last layers). There are
# far more weights than examples, so (A1) holds. We take some of a model's members as $X$, ask for the same margin 1 of
# all of them, and take $\Sigma$ as the covariance of the features of some of its non-members. The closed form then says
# how the variance contracts on *those*; on *other* non-members we compute it. Against this stands the measured
# ratio of variances of $\phi$ on non-members, SAM over SGD.

# %%
n_fit = 100  # members to fit; twice as many non-members, every other one behind Σ


def tangent_model(ensemble, index):
    """Features of one network's members, of the non-members behind Σ and of others: three arrays [.., d > n]."""
    inside, outside = (np.flatnonzero(ensemble.member[index] == side) for side in (True, False))
    inside, outside = inside[:n_fit], outside[: 2 * n_fit]
    features = flatness.tangent_features(ensemble, int(ensemble.ids[index]), np.concatenate([inside, outside]))
    # J' = QR: the rows of R' are the same features in coordinates of their span
    z = qr(features.T, mode="r")[0][: len(features)].T
    x, new = z[: len(inside)], z[len(inside) :]
    return x[interpolation.independent_rows(x)], new[::2], new[1::2]


# %% [markdown]
# With the formula of Theorem 1 for the non-members behind $\Sigma$, and $w_\eta^\top\,\mathrm{cov}\,w_\eta$ for the others.
# $\eta$ is in units of the mean curvature.

# %%
tangent_etas = np.array([0, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])


def feature_path(ensemble, index):
    """V(eta)/V(0) of one network's tangent model, on the non-members behind Σ and on others: [2, etas]."""
    x, behind, others = tangent_model(ensemble, index)
    sigma, new = np.cov(behind, rowvar=False), np.cov(others, rowvar=False)
    scale = len(sigma) / np.trace(sigma)
    path = interpolation.spectral(x, np.ones(len(x)), sigma)
    v = [interpolation.variance(interpolation.weights(path, eta * scale), new) for eta in tangent_etas]
    return interpolation.contraction(path, tangent_etas * scale)[0] / path.v0, np.array(v) / v[0]


# %%
kept = [i for i, k in enumerate(ensembles[baseline].ids[:8]) if k < KEEP_WEIGHTS]
paths = np.array([feature_path(ensembles[baseline], i) for i in kept])  # [models, 2, etas]
sides = ("closed form, non-members behind Σ", "predicted, other non-members")
tangent = pd.DataFrame(
    intervals.row("variance_ratio", flatness.t_interval(paths[:, side, j]), x=eta, series=series)
    for side, series in enumerate(sides)
    for j, eta in enumerate(tangent_etas)
)
predicted = tangent[(tangent.series == sides[1]) & (tangent.x > 0)]
predicted = predicted.assign(optimizer=[f"eta={eta:g}" for eta in predicted.x])
results.add(predicted, note="feature space, predicted", n_models=len(kept))

# %%
cells = {name: compare.variance_influence_values(e, "phi", "across_examples") for name, e in ensembles.items()}
real = compare.ratio(cells[treatment], cells[baseline])
measured_row = intervals.row(
    "variance_ratio", real, optimizer=f"{treatment}/{baseline}", series=f"measured, {treatment} over {baseline}"
)
results.add(pd.DataFrame([measured_row]), note="feature space, measured", n_models=len(ensembles[baseline].ids))
across = pd.DataFrame([{**measured_row, "x": eta} for eta in tangent_etas])
frame = pd.concat([tangent, across]).assign(panel="tangent features")
figures.save(figures.curves(frame, r"$\eta$", {"tangent features": "ratio of variances"}, levels=True), run, "features")

# %% [markdown]
# **How to read it.** The gap between the two falling lines is overfitting of $\Sigma$ itself: a few non-members do not
# pin down so many directions. The measured ratio is one number, drawn across. It can meet the prediction for
# some $\eta$, or for none.

# %%
lowest, nearest = (predicted.loc[i] for i in (predicted.value.idxmin(), (predicted.value - real.value).abs().idxmin()))
said = f"Measured {number(*real)}; the lowest prediction is {number(lowest.value, lowest.ci_low, lowest.ci_high)}."
if real.low > max(1, predicted.ci_high.max()):
    show_text(f"**No agreement.** {said} The variance grew, further than at any eta here; the closed form never grows.")
elif real.high < predicted.ci_low.min():
    show_text(f"**No agreement.** {said} The variance fell further than at any eta here.")
elif real.low <= 1 <= real.high:
    show_text(f"**Undecided.** {said} No contraction at all, 1, is within the measured interval.")
else:
    show_text(f"**No conflict.** {said} The prediction moves from 1 with eta and is nearest at {nearest.optimizer}.")

# %% [markdown]
# Agreement of one number with a curve that has a free $\eta$ is weak evidence, and disagreement of sign strong:
# contraction is what the theorem predicts for *every* $\eta > 0$.

# %% [markdown]
# ## What this run shows
#
# Computed from the numbers above, whatever they are.

# %%
strongest = {s: f[(f.optimizer == last) & (f.metric == "variance_ratio")].value.iloc[0] for s, f in tables.items()}
low, high = min(strongest, key=strongest.get), max(strongest, key=strongest.get)
show_text(
    f"**The theorem, in its setting.** At {last} the variance falls to {strongest[low]:.2f} of itself "
    f"({', '.join(map(str, low))}) at the most, and to {strongest[high]:.2f} ({', '.join(map(str, high))}) at the least."
)
gaps = limits.assign(gap=(limits.value - 1).abs()).groupby("note").gap.max()
show_text(
    "**Its premises.** Largest change, by curvature: " + ", ".join(f"{k[7:]} {g:.1g}" for k, g in gaps.items()) + "."
)
worst = descent.set_index(["metric", "optimizer"]).value["distance_to_minimum_norm", "sam"]
show_text(f"**SAM on a linear model** ends within {worst:.1g} of the minimum 2-norm, where gradient descent ends.")

# %%
for name in ("phi", "confidence"):
    row, beside = (difference(found, f"{who}_variance_{name}_across_examples", pair) for who in ("nonmember", "member"))
    words = describe_sign(row, *than), describe_sign(beside, *than)
    show_text(
        f"**Real networks, {name}.** On non-members, {treatment} varies {words[0]} {baseline}; on members, {words[1]} {baseline}."
    )
show_text(f"All numbers of this run: `{results.path.name}` beside this notebook's copy, {results.count()} rows.")

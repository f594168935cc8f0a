"""What a run will train, in units of work, so that its time can be told from the first models' time."""

from lib import audit, beyond, ensemble, memorization, models
from lib.optimizers import fingerprint
from lib.store import place

# passes forward and back that a step makes, as each rule's paper counts them (a forward pass alone is a third)
GRADIENTS = {"plain": 1, "swa": 1, "esam": 1 + 1 / 3 + 1 / 2, "dpsgd": 3, "dpsam": 6}


def gradients(recipe):
    """Gradient evaluations a step: 1 for SGD, 2 for SAM, 1 + 1/k for LookSAM."""
    name = recipe.named.rule_name
    if name == "looksam":
        return 1 + 1 / fingerprint(recipe.named)["options"]["k"]
    return GRADIENTS.get(name, 2)


def work(recipe, n, n_models):
    """Gradients of one example that these models take, in all."""
    size = round(n * recipe.subset)
    return n_models * recipe.run_epochs * (size // recipe.batch_size * recipe.batch_size) * gradients(recipe)


def wanted(run):
    """What the notebooks train: notebook -> list of (Recipe, Dataset, n_models); what two of them share comes twice."""
    base, other, data = run.names[0], run.other, run.dataset

    def of(name, n_models, dataset=data, **changes):
        return run.recipe(name, **changes), dataset, n_models

    main = [of(name, run.n_models) for name in run.names]
    doses = [of(run.recipe(other).named.base_name, run.sweep)] + [of(other, run.sweep, rho=r) for r in run.doses(other)]
    lengths = [(e, name) for e in run.regimes() for name in (base, other)] + [(e, base) for e in run.between()]
    planted = min(run.n_models, max(32, run.n_models // 4))
    longest = [of(base, planted, epochs=run.regimes()[-1], subset=0.5)]
    return {
        "01": [*main, *doses, *(of(name, run.sweep, epochs=e) for e, name in lengths), leak(run, of)],
        "02": [*main, *longest, *longest],  # the second time on data that are not there yet
        "03": main,
        "04": [*main, *doses],
        "06": [*main, *(of(name, run.few, epochs=e) for e, name in lengths), *beyond_models(run, of)],
    }


def leak(run, of):
    """The planted leak of notebook 01, on its data; before the baseline is trained, which chooses the example, on a
    stand-in of the same size, with another example."""
    base, data = run.names[0], run.dataset
    recipe, example = run.recipe(base), 0
    if count(recipe, data, 0, run.n_models, run.store) == run.n_models:
        found = audit.align({name: run.train(name) for name in (base,)})[base]
        example = audit.least_sure(audit.plain_signal(found, "phi"), found.member)
    leaky, _ = memorization.leak(data, example, audit.leak_times(len(data.y)), seed=run.seed)
    return of(base, audit.PLANTED, leaky, subset=0.5)


def beyond_models(run, of):
    """What notebook 06 trains beside the lengths of the first."""
    base, other = run.names[0], run.other
    names = [beyond.on(base)(name) for name in (*beyond.VARIANTS, "sharpreg", "swa")]
    made = [of(name, run.few, rho=f * run.recipe(name).rho) for name in names for f in run.strengths]
    made += [of(base, run.few, epochs=2 * run.epochs), of(other, run.few, epochs=max(1, run.epochs // 2))]
    for changes, data in beyond.chosen_levels(run, run.most_levels).values():
        made += [of(name, run.few, data, **changes) for name in (base, other)]
    made += [of(base, run.few, smoothing=0.1), of(base, run.few, stop=0.25), of(base, run.few, stop=0.5)]
    arch = beyond.WITHOUT_NORM.get(run.arch, run.arch)
    rules = [f"{rule}(sigma=1.0)" for rule in ("dpsgd", "dpsam") for _ in run.epsilons]
    if models.has_batchnorm(models.build(arch, run.dataset.x.shape[1:], run.dataset.n_classes)):
        return made
    return made + [of(name, run.private, arch=arch) for name in [base, *map(beyond.on(base), rules)]]


def left(run, notebooks=None):
    """(work still to do, work in all) of a run's notebooks ("01", ...; default all); what the store has is done."""
    seen, total, to_do = {}, 0.0, 0.0
    for notebook, ensembles in wanted(run).items():
        for recipe, dataset, n_models in ensembles if notebooks is None or notebook in notebooks else ():
            key = (recipe, dataset.hash, notebook if notebook == "02" and n_models != run.n_models else "")
            before = seen.get(key, 0)
            seen[key] = max(before, n_models)
            done = count(recipe, dataset, before, n_models, run.store)
            total += work(recipe, len(dataset.y), max(0, n_models - before))
            to_do += work(recipe, len(dataset.y), max(0, n_models - before) - done)
    return to_do, total


def count(recipe, dataset, low, high, store):
    """How many of the models low..high-1 are finished in the store; nothing is made there."""
    folder, _ = place(store, *ensemble.store_key(recipe, dataset))
    return sum((folder / "done" / f"{k:05d}.json").exists() for k in range(low, high))


def duration(seconds):
    """'40 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Forecast:
    """Tells once, after the second chunk of models, how long the rest of a run's training will take.

    The first chunk may also have compiled its step, which later ones are spared.
    """

    def __init__(self, run):
        self.run, self.chunks = run, 0

    def __call__(self, recipe, n_examples, n_models, seconds):
        self.chunks += 1
        if self.chunks != 2:
            return
        to_do, total = left(self.run)
        words = duration(to_do / work(recipe, n_examples, n_models) * seconds)
        done = 1 - to_do / total
        print(f"Training for all the notebooks of this run: about {words} to go, {done:.0%} is done.", flush=True)

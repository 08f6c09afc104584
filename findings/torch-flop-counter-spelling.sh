#!/bin/sh
# torch's FlopCounterMode gives the same arithmetic on a CPU full price or none, by how it is written.
#
# A search of keys by one query costs 2 * slots * width as a product with a matrix of one column, and 0 as one with a
# vector (aten::mv has no formula). A GRU is counted, an LSTM of the same sizes is 0: on CPU it is one fused operator
# (mkldnn_rnn_layer) without a formula. nn.TransformerEncoderLayer is counted while it trains and is 0 in evaluation
# without gradients, where it takes its fused path. So a memory that is an LSTM, or that is read by one vector, looks
# free beside one that is not, and "FLOPs per token at evaluation" of a stock encoder is nothing. Formulas that are
# compared with this counter must be compared on spellings that it knows.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" && "$place/venv/bin/pip" install -q torch==2.13.0 numpy || exit 2
cat > "$place/try.py" <<'PY'
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SLOTS, WIDTH, STEPS, ROWS = 64, 32, 5, 16


def counted(name, work, arithmetic):
    """What the counter says of `work`, beside the multiplications and additions that it makes."""
    with FlopCounterMode(display=False) as counter:
        work()
    print(f"{name}: counted {counter.get_total_flops():,}, arithmetic {arithmetic:,}")
    return counter.get_total_flops()


torch.manual_seed(0)
print("torch", torch.__version__)
keys, query = torch.randn(SLOTS, WIDTH), torch.randn(WIDTH)
search = 2 * SLOTS * WIDTH
same = counted("64 keys by one query, as a matrix of one column", lambda: keys @ query[:, None], search) == search
same &= counted("64 keys by one query, as a vector", lambda: keys @ query, search) == 0

text = torch.randn(STEPS, 1, WIDTH)
for kind, gates, expected in ((nn.GRU, 3, True), (nn.LSTM, 4, False)):
    layer, arithmetic = kind(WIDTH, WIDTH), STEPS * 2 * gates * 2 * WIDTH * WIDTH
    found = counted(f"{kind.__name__}, 5 steps", lambda layer=layer: layer(text), arithmetic)
    same &= found == (arithmetic if expected else 0)

layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
x = torch.randn(2, ROWS, WIDTH)
products = 2 * (2 * ROWS) * (4 * WIDTH * WIDTH + 2 * 2 * WIDTH * WIDTH)  # attention's own products come on top
same &= counted("an encoder layer in training", lambda: layer.train()(x), products) >= products
with torch.no_grad():
    same &= counted("the same layer in evaluation", lambda: layer.eval()(x), products) == 0
print("as described" if same else "the behaviour has changed")
sys.exit(not same)
PY
"$place/venv/bin/python" -W ignore "$place/try.py"

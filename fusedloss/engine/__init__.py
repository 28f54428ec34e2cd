"""One call: checked arguments become rows, operators and autograd functions run on them."""

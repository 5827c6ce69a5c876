"""Schedule spaces, one file per idea: each turns the phase form into a design space for one kind of target."""

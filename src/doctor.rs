//! `selvedge doctor`: what is wrong with this node's mesh, and what to do.

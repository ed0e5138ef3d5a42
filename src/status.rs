//! `selvedge status`: what this node's agent sees and does.

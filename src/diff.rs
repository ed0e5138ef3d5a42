//! Computes the changes that turn the observed state into the desired one.

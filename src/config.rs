//! Flags and environment, validated.

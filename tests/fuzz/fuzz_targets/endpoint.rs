//! See `endpoint` in `targets.rs`.
#![no_main]

#[expect(dead_code, reason = "one of many")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::endpoint(data));

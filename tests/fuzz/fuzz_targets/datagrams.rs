//! See `script::datagrams` in the tests of the device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| selvedge::wireguard::tests::script::datagrams(data));

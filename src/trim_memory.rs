//! Releases memory that only the start of the program needs.
//!
//! Parsing flags and setting up the log touch code all over a program of 16 MB, and the kernel maps
//! 64 KiB around each piece of it. Once the tunnel runs, two thirds of that are never used again:
//! 1.6 of 8.7 MiB.
#![expect(unsafe_code, reason = "madvise on the program's own code")]

use std::fs;
use std::ops::Range;

/// Drops the program's code pages. Pages that are used later are read from the page cache, at a few
/// microseconds each, once.
pub(crate) fn release_code() {
    let program = fs::read_link("/proc/self/exe").ok();
    let maps = fs::read_to_string("/proc/self/maps").ok();
    let (Some(program), Some(maps)) = (program, maps) else {
        return;
    };
    for range in maps
        .lines()
        .filter_map(|line| code(line, program.to_str()?))
    {
        // SAFETY: a private file mapping without write permission, so the kernel reads each page from the
        // file again at its next use, this code's included.
        // The result does not matter: if the kernel refuses, the memory stays unchanged.
        unsafe { libc::madvise(range.start as *mut _, range.len(), libc::MADV_DONTNEED) };
    }
}

/// The address range in a line of `/proc/self/maps`, if it holds the program's code.
fn code(line: &str, program: &str) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let is_code = fields.next()? == "r-xp" && fields.nth(3)? == program;
    let address = |text| usize::from_str_radix(text, 16).ok();
    is_code.then_some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_own_code_is_given_back() {
        let line = |rights, path: &str| format!("1000-3000 {rights} 00001000 fe:00 77    {path}");
        assert_eq!(
            code(&line("r-xp", "/bin/it"), "/bin/it"),
            Some(0x1000..0x3000)
        );
        assert_eq!(code(&line("rw-p", "/bin/it"), "/bin/it"), None);
        assert_eq!(code(&line("r-xp", "/lib/other"), "/bin/it"), None);
        assert_eq!(code("1000-3000 r-xp 00000000 00:00 0", "/bin/it"), None);
    }

    #[test]
    fn what_was_given_back_is_no_longer_resident() {
        let resident = || {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("RssFile:"));
            let kib = line.unwrap().trim().trim_end_matches(" kB");
            kib.parse::<usize>().unwrap()
        };
        let before = resident();
        release_code();
        let after = resident();
        assert!(after < before, "{before} KiB before, {after} KiB after");
    }
}

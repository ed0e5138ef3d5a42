//! The source is the named release with the patches, and `scripts/vendor-boringtun --check` finds out
//! when it is not. Needs the release: from the registry, or kept by cargo from an earlier run.
#![expect(
    clippy::disallowed_methods,
    reason = "runs the script, on a copy of the crate"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A copy of the crate and of the script beside it, removed on drop.
struct Copy(PathBuf);

impl Copy {
    fn new(name: &str) -> Copy {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let copy = Copy(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
        let _ = fs::remove_dir_all(&copy.0);
        for part in ["scripts", "vendor"] {
            fs::create_dir_all(copy.0.join(part)).expect("a directory for the copy");
        }
        run(Command::new("cp")
            .arg(root.join("scripts/vendor-boringtun"))
            .arg(copy.0.join("scripts")));
        run(Command::new("cp")
            .arg("-r")
            .arg(root.join("vendor/boringtun"))
            .arg(copy.0.join("vendor")));
        copy
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.0.join("scripts/vendor-boringtun"));
        command.arg("--check").env("CI", "true");
        command
    }

    fn edit(&self, file: &str, from: &str, to: &str) {
        let path = self.0.join("vendor/boringtun").join(file);
        let text = fs::read_to_string(&path).expect("a file of the crate");
        assert!(text.contains(from), "{} has no {}", file, from);
        fs::write(&path, text.replacen(from, to, 1)).expect("a file of the copy");
    }

    /// What `--check` says of the copy, which it must refuse.
    fn refusal(&self) -> String {
        let output = self.command().output().expect("the script runs");
        assert!(!output.status.success(), "accepted: {}", text(&output));
        text(&output)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("the program runs");
    assert!(output.status.success(), "{:?}: {}", command, text(&output));
    text(&output)
}

fn first_patch(copy: &Copy) -> PathBuf {
    let patches = fs::read_dir(copy.0.join("vendor/boringtun/patches")).expect("the patches");
    patches
        .map(|entry| entry.expect("an entry").path())
        .min()
        .expect("a patch")
}

#[test]
fn the_source_is_the_release_with_the_patches() {
    assert_eq!(run(&mut Copy::new("unchanged").command()), "");
}

#[test]
fn a_changed_line_of_the_source_is_found() {
    let copy = Copy::new("line");
    copy.edit(
        "src/noise/handshake.rs",
        "timestamp <= self",
        "timestamp < self",
    );
    assert!(copy.refusal().contains("-        if timestamp <= self"));
}

#[test]
fn a_file_without_a_patch_is_found() {
    let copy = Copy::new("file");
    fs::write(copy.0.join("vendor/boringtun/src/more.rs"), "").expect("a file of the copy");
    assert!(copy.refusal().contains("more.rs"));
}

#[test]
fn a_missing_patch_is_found() {
    let copy = Copy::new("patch");
    fs::remove_file(first_patch(&copy)).expect("a patch of the copy");
    assert!(copy.refusal().contains("patches do not apply"));
}

#[test]
fn an_archive_with_another_checksum_is_refused() {
    let copy = Copy::new("checksum");
    copy.edit("UPSTREAM", "sha256 1", "sha256 2");
    assert!(copy.refusal().contains("compare the checksums"));
}

#[test]
fn another_version_in_the_manifest_is_found() {
    let copy = Copy::new("version");
    copy.edit("Cargo.toml", "\nversion = \"", "\nversion = \"9");
    assert!(copy.refusal().contains("another version"));
}

#[test]
fn without_the_release_the_check_says_so_and_fails_in_ci() {
    let copy = Copy::new("offline");
    let mut offline = copy.command();
    offline
        .env("CARGO_HOME", copy.0.join("cargo"))
        .env("CARGO_NET_OFFLINE", "true");
    let refused = offline.output().expect("the script runs");
    assert!(!refused.status.success());
    assert!(text(&refused).contains("cannot fetch"));
    assert!(run(offline.env_remove("CI")).contains("src was not checked"));
}

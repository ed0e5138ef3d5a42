//! What the documents claim by name is there: tests, flags, annotations.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test may run the program, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use selvedge::cluster::annotation;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn guide() -> String {
    fs::read_to_string(Path::new(ROOT).join("docs/migration.md")).unwrap()
}

/// The part of the guide under a heading of the second level.
fn section(heading: &str) -> String {
    let guide = guide();
    let start = guide.find(&format!("\n## {heading}\n")).unwrap();
    let rest = &guide[start + 1..];
    let end = rest[3..].find("\n## ").map_or(rest.len(), |end| end + 3);
    rest[..end].to_owned()
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The code of the product, its tests and the lab, but for this file, which names what it looks for.
fn code(directories: &[&str]) -> String {
    let mut files = Vec::new();
    for directory in directories {
        let path = Path::new(ROOT).join(directory);
        if path.is_dir() {
            sources(&path, &mut files);
        } else if path.is_file() {
            files.push(path);
        }
    }
    files.retain(|file| !file.ends_with("documents.rs"));
    let texts = files.iter().map(|file| fs::read_to_string(file).unwrap());
    texts.collect()
}

/// Whether there is a function of the standard runner's, or a step of a lab's, of this name.
fn has_test(code: &str, name: &str) -> bool {
    // A step that is made for several nodes has the node in the middle of its name.
    let mut patterns = code.split("format!(\"").skip(1).filter_map(|rest| {
        let (literal, _) = rest.split_once('"')?;
        let (before, rest) = literal.split_once('{')?;
        let (_, after) = rest.split_once('}')?;
        (before.len() + after.len() > 20).then_some((before, after))
    });
    code.contains(&format!("fn {name}("))
        || code.contains(&format!("\"{name}\""))
        || patterns.any(|(before, after)| name.starts_with(before) && name.ends_with(after))
}

#[test]
fn every_case_of_the_evidence_has_a_test_and_a_control_where_it_says() {
    let table = fs::read_to_string(Path::new(ROOT).join("docs/evidence.md")).unwrap();
    let rows: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| case"))
        .collect();
    assert!(rows.len() >= 10, "{} rows", rows.len());
    let mut numbers = BTreeSet::new();
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [number, _, test, control] = cells[..] else {
            panic!("not four cells: {row}");
        };
        assert!(numbers.insert(number), "{number} stands there twice");
        for cell in [test, control] {
            if cell == "in it" && cell == control {
                continue;
            }
            let (binary, name) = cell.split_once(": `").unwrap_or_else(|| panic!("{row}"));
            let name = name.trim_end_matches('`');
            let code = match binary {
                "lib" => code(&["src"]),
                // The steps that labs have in common stand in the lab.
                _ => code(&[
                    &format!("tests/{binary}"),
                    &format!("tests/labs/{binary}.rs"),
                    &format!("tests/labs/{binary}"),
                    "lab/src",
                ]),
            };
            assert!(has_test(&code, name), "{binary} has no {name}: {row}");
        }
    }
}

/// A row may name a file instead, such as the lints that forbid clocks.
#[test]
fn every_invariant_of_the_architecture_names_a_test_that_exists() {
    let text = fs::read_to_string(Path::new(ROOT).join("ARCHITECTURE.md")).unwrap();
    let (_, table) = text.split_once("\n| invariant | tested in |\n").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let rows: Vec<_> = table.lines().skip(1).collect();
    assert!(rows.len() >= 26, "{} rows", rows.len());
    let code = code(&["src", "tests", "lab/src"]);
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
        let [_, shown] = cells[..] else {
            panic!("not two cells: {row}");
        };
        let names: Vec<_> = quoted(shown).collect();
        assert!(!names.is_empty(), "shown by nothing: {row}");
        for name in names {
            let exists = has_test(&code, name) || Path::new(ROOT).join(name).exists();
            assert!(exists, "no test is called {name}: {row}");
        }
    }
}

/// Paths of files of the repository, as documents name them: from its root, or from `src`.
#[test]
fn every_file_that_a_document_names_exists() {
    let root = Path::new(ROOT);
    let mut checked = 0;
    for document in [
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "README.md",
        "SECURITY.md",
        "bench/README.md",
        "docs/evidence.md",
        "docs/ipv6.md",
        "docs/migration.md",
        "docs/overlapping-networks.md",
    ] {
        let text = fs::read_to_string(root.join(document)).unwrap();
        for name in quoted(&text) {
            let name = name.split_whitespace().next().unwrap_or_default();
            let file = name.ends_with(".rs") || name.ends_with(".sh");
            let inside = ["tests/", "bench/", "lab/", "scripts/", "docs/", "deploy/"];
            let inside = inside.iter().any(|directory| name.starts_with(directory));
            let placeholder = name.contains(['*', '{', '<']);
            if (file || inside) && !placeholder {
                let exists = ["", "src"]
                    .iter()
                    .any(|base| root.join(base).join(name).exists());
                assert!(exists, "{document} names {name}, which is not there");
                checked += 1;
            }
        }
    }
    assert!(checked > 20, "only {checked} files are named");
}

/// Each promise of SECURITY.md names what shows it.
#[test]
fn every_row_of_security_names_a_test_that_exists() {
    let text = fs::read_to_string(Path::new(ROOT).join("SECURITY.md")).unwrap();
    let code = code(&["src", "tests", "lab/src"]);
    let rows = text.lines().filter(|line| line.starts_with("| "));
    let rows = rows.filter(|line| !line.starts_with("| against"));
    let rows: Vec<_> = rows.filter_map(|row| row.split('|').nth(1)).collect();
    assert!(rows.len() >= 11, "{} rows", rows.len());
    for row in rows {
        // A list below the table has an item for each row, by its first cell.
        let item = text.split_once(&format!("\n- {}:", row.trim()));
        let (_, item) = item.unwrap_or_else(|| panic!("shown by nothing: {row}"));
        let ends = ["\n- ", "\n\n"]
            .into_iter()
            .filter_map(|end| item.find(end));
        let end = ends.min().unwrap_or(item.len());
        let names: Vec<_> = quoted(&item[..end]).collect();
        assert!(!names.is_empty(), "shown by nothing: {row}");
        for name in names {
            assert!(has_test(&code, name), "no test is called {name}: {row}");
        }
    }
}

#[test]
fn every_bug_of_kilos_has_a_test_that_exists() {
    let code = code(&["src", "tests", "lab/src"]);
    let table = section("Kilo's known bugs");
    let rows: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| in Kilo"))
        .collect();
    assert!(rows.len() >= 35, "{} rows", rows.len());
    for row in rows {
        let cells: Vec<_> = row.split(" | ").collect();
        let [_, _, shown] = cells[..] else {
            panic!("not three cells: {row}");
        };
        let names: Vec<_> = quoted(shown).collect();
        assert!(!names.is_empty(), "shown by nothing: {row}");
        for name in names {
            assert!(has_test(&code, name), "no test is called {name}: {row}");
        }
    }
}

#[test]
fn every_flag_of_the_agent_is_in_the_migration_guide_and_every_flag_there_exists() {
    let output = Command::new(env!("CARGO_BIN_EXE_selvedge"))
        .args(["agent", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let flag = |word: &str| -> Option<String> {
        let word = word.strip_prefix("--")?;
        let end = word.find(|c: char| !(c.is_ascii_lowercase() || c == '-'));
        Some(word[..end.unwrap_or(word.len())].to_owned())
    };
    let ours: BTreeSet<_> = help.split_whitespace().filter_map(flag).collect();
    assert!(ours.len() > 20, "{ours:?}");
    let section = section("Flags");
    let named: BTreeSet<_> = quoted(&section).filter_map(flag).collect();

    // Flags without an effect are accepted, and hidden in the help.
    // The version is asked of the program, as of kg, and not of its agent.
    let hidden = named.difference(&ours).filter(|flag| *flag != "version");
    for flag in hidden {
        let output = Command::new(env!("CARGO_BIN_EXE_selvedge"))
            .args(["agent", &format!("--{flag}="), "--log-level=loud"])
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(
            !complaint.contains("unexpected") && !complaint.contains("unknown flag"),
            "--{flag} of the guide: {complaint}"
        );
    }
    let missing: Vec<_> = ours
        .difference(&named)
        .filter(|flag| *flag != "help")
        .collect();
    assert!(missing.is_empty(), "not in the guide: {missing:?}");
}

#[test]
fn every_annotation_that_is_published_is_in_the_migration_guide() {
    let section = section("Annotations and labels");
    let named: BTreeSet<_> = quoted(&section).collect();
    for key in annotation::PUBLISHED {
        let short = key.strip_prefix("kilo.squat.ai/").unwrap_or(key);
        assert!(named.contains(short), "{key} is not in the guide");
    }
}

/// Kilo's public interface, as its documentation and its programs describe it, by the guide's sections.
#[test]
fn nothing_of_kilos_interface_is_missing_in_the_migration_guide() {
    let interface = [
        (
            "Flags",
            "--backend --clean-up --clean-up-interface --cni --cni-path --compatibility \
             --create-interface --encapsulate --hostname --interface --internal-cidr \
             --iptables-forward-rules --kubeconfig --listen --local --log-level --master \
             --mesh-granularity --mtu --port --prioritise-private-addresses --resync-period \
             --service-cidr --subnet --topology-label --version --cert-file --key-file \
             --listen-metrics webhook completion",
        ),
        (
            "kgctl",
            "graph showconf connect --as-peer wireguard\\|json\\|yaml --allowed-ip --allowed-ips \
             --private-key --clean-up --mtu --resync-period --interface --persistent-keepalive \
             --log-level --backend --kubeconfig --mesh-granularity=auto --port --topology-label \
             --version",
        ),
        (
            "Annotations and labels",
            "endpoint force-endpoint internal-ip force-internal-ip key last-seen wireguard-ip \
             discovered-endpoints granularity cni-compatibility-ip leader location \
             persistent-keepalive allowed-location-ips topology.kubernetes.io/region podCIDRs",
        ),
        (
            "Files, links, ports",
            "/var/lib/kilo/key /etc/cni/net.d/10-kilo.conflist kilo0 tunl0 kube-bridge \
             /var/run/wireguard/kilo0.sock 51820/udp 1107/tcp 8443/tcp /run/xtables.lock \
             /lib/modules /etc/kubernetes/kubeconfig",
        ),
        (
            "HTTP",
            "/health /metrics /graph?format=&layout= /debug/pprof/",
        ),
        (
            "Metrics",
            "kilo_errors_total kilo_leader kilo_nodes kilo_peers kilo_reconciles_total \
             kilo_iptables_operations_total go_ process_ wireguard_ admission_requests_total \
             http_requests_total errors_total PodMonitor",
        ),
        (
            "Routes, rules, firewall",
            "main 1107 10.4.0.0/16 KILO-NAT MTU",
        ),
        ("Rights", "privileged token probes"),
    ];
    for (heading, words) in interface {
        let section = section(heading);
        for word in words.split_whitespace() {
            assert!(section.contains(word), "{word} is not under {heading}");
        }
    }
}

/// Words that are not plain English for this product: a sentence names its subject, and a thing has one name.
const REFUSED_WORDS: [&str; 14] = [
    "all the same",
    "anew",
    "anybody",
    "are told",
    "as ever",
    "by itself",
    "comes to rest",
    "is nobody",
    "is told",
    "nobody",
    "somebody",
    "was told",
    "whoever",
    "whomever",
];

/// Texts of the product: code, documents, manifests and scripts; not the vendored crate or data of tests.
fn texts(directory: &Path, found: &mut Vec<PathBuf>) {
    const SKIPPED: [&str; 7] = [
        ".git",
        "artifacts",
        "corpus",
        "node_modules",
        "target",
        "testdata",
        "vendor",
    ];
    const KINDS: [&str; 7] = ["md", "py", "rs", "sh", "toml", "yaml", "yml"];
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() && !path.is_symlink() {
            if !SKIPPED.contains(&name.as_str()) {
                texts(&path, found);
            }
        } else if KINDS.iter().any(|kind| name.ends_with(&format!(".{kind}"))) || name == "Makefile"
        {
            found.push(path);
        }
    }
}

/// Whether a text holds the word, with no letter, digit or underscore next to it.
fn holds_word(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

#[test]
fn no_text_of_the_product_has_a_refused_word() {
    assert!(holds_word("that nobody saw", "nobody") && !holds_word("of_nobody", "nobody"));
    let mut files = Vec::new();
    texts(Path::new(ROOT), &mut files);
    // This file lists the words.
    files.retain(|file| !file.ends_with("tests/unit/documents.rs"));
    assert!(files.len() > 300, "{} files", files.len());
    let mut found = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).unwrap();
        for (number, line) in text.lines().enumerate() {
            let line = line.to_lowercase();
            for word in REFUSED_WORDS {
                if holds_word(&line, word) {
                    let file = file.strip_prefix(ROOT).unwrap().display();
                    found.push(format!("{file}:{}: {word}", number + 1));
                }
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

//! The direction of imports: each module imports only from the rows below its own.
//!
//! Imports that run in a circle tie files together that a reader can then only understand at once. This
//! test reads the sources, not the compiled program. It leaves out test modules, and paths inside of
//! macros.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// The modules of the program, from the bottom to the top. Modules of one row don't import each other.
const PROGRAM: &[&[&str]] = &[
    &[
        "clock",
        "envelope",
        "policy",
        "refusal",
        "secure_file",
        "text",
        "trim_memory",
        "wireguard",
    ],
    &["liveness", "node_lock", "port_holder", "preflight", "state"],
    &["diff", "flannel", "status"],
    &["telemetry"],
    &["kernel", "topology", "tunnel"],
    &["config", "guard", "probe", "reconciler", "resolve"],
    &["plan"],
    &["cluster"],
    &["doctor", "survey"],
    &["graph", "showconf"],
    &["connect", "pages"],
    &["agent"],
    &["cli"],
];

/// The modules of the tunnel device, likewise.
const WIREGUARD: &[&[&str]] = &[
    &[
        "abort",
        "checksum",
        "clock",
        "drops",
        "events",
        "key",
        "packet",
        "protocol",
        "replay",
        "sequencer",
        "staged",
    ],
    &[
        "config",
        "gso",
        "icmp",
        "nested",
        "timers",
        "timestamp",
        "translation",
        "uapi",
    ],
    &[
        "divert",
        "endpoint_rule",
        "relay_packet",
        "timestamp_store",
        "tun",
    ],
    &["link", "timestamp_sequence"],
    &["routes"],
    &["udp"],
    &["way"],
    &["identity", "place"],
    &["pairings"],
    &["peer", "session"],
    &["admission", "indices", "relay_table"],
    &["table"],
    &["core", "held"],
    &["send"],
    &["receive", "transmit"],
    &["handshake", "io"],
    &["bench_support", "duplex", "reconfigure"],
    &["threads"],
];

/// The one circle: a session reports to its peer, and a peer holds its sessions.
const CIRCLE: (&str, &str) = ("peer", "session");

#[test]
fn the_modules_of_the_program_import_only_from_the_rows_below() {
    let imports = imports(
        &PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src")),
        &[],
    );
    assert_directed(PROGRAM, &imports, None);
}

#[test]
fn the_modules_of_the_device_import_only_from_the_rows_below() {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/wireguard"));
    assert_directed(WIREGUARD, &imports(&folder, &["wireguard"]), Some(CIRCLE));
}

#[test]
fn an_import_from_a_row_above_is_found_and_named() {
    let rows: &[&[&str]] = &[&["below"], &["above"]];
    let imports = BTreeMap::from([
        ("above".to_owned(), BTreeSet::from(["below".to_owned()])),
        ("below".to_owned(), BTreeSet::from(["above".to_owned()])),
    ]);
    assert_eq!(
        wrong(rows, &imports, None),
        ["`below` imports `above`, which is not in a row below its own"]
    );
    assert_eq!(wrong(rows, &imports, Some(("above", "below"))), [""; 0]);
}

#[test]
fn imports_are_found_in_every_form_and_not_in_test_modules() {
    let text = "
        use super::super::udp::Sockets;
        use crate::{policy, state::{State, Rule}};
        fn f() -> crate::text::Quoted { super::own::g() }
        #[cfg(test)]
        mod tests { use crate::kernel; }
    ";
    // As if of the file src/wireguard/udp/control.rs.
    let module = ["wireguard", "udp", "control"].map(str::to_owned);
    let found = found(&syn::parse_file(text).unwrap(), &module);
    let expected = [
        ["policy", ""],
        ["state", "Rule"],
        ["state", "State"],
        ["text", "Quoted"],
        ["wireguard", "udp"],
    ];
    for [first, second] in expected {
        assert!(
            found
                .iter()
                .any(|path| path[0] == first && path.get(1).map_or("", String::as_str) == second),
            "{first}::{second} in {found:?}"
        );
    }
    assert!(!found.iter().any(|path| path[0] == "kernel"), "{found:?}");
}

fn assert_directed(
    rows: &[&[&str]],
    imports: &BTreeMap<String, BTreeSet<String>>,
    circle: Option<(&str, &str)>,
) {
    let wrong = wrong(rows, imports, circle);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// One sentence for each import that the rows don't allow, and for each module that has no row.
fn wrong(
    rows: &[&[&str]],
    imports: &BTreeMap<String, BTreeSet<String>>,
    circle: Option<(&str, &str)>,
) -> Vec<String> {
    let row = |module: &str| rows.iter().position(|row| row.contains(&module));
    let mut wrong = Vec::new();
    for (module, imported) in imports {
        let Some(own) = row(module) else {
            wrong.push(format!("`{module}` stands in no row of {}", file!()));
            continue;
        };
        for other in imported {
            let pair = (module.as_str(), other.as_str());
            let in_circle =
                circle.is_some_and(|(one, two)| pair == (one, two) || pair == (two, one));
            if !in_circle && row(other).is_none_or(|other| other >= own) {
                wrong.push(format!(
                    "`{module}` imports `{other}`, which is not in a row below its own"
                ));
            }
        }
    }
    wrong
}

/// What each module of a folder imports of the others there; `parent` is the path of the folder's module.
fn imports(folder: &Path, parent: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let mut files = Vec::new();
    collect(folder, &mut files);
    let mut imports = BTreeMap::<String, BTreeSet<String>>::new();
    for file in files {
        let inside = file.strip_prefix(folder).unwrap().with_extension("");
        let inside = inside
            .iter()
            .map(|part| part.to_str().unwrap().to_owned())
            .collect::<Vec<_>>();
        // The program's own parts, and files that only tests use.
        if ["lib", "main", "bin"].contains(&inside[0].as_str())
            || inside.iter().any(|part| part == "tests")
        {
            continue;
        }
        let path = parent.iter().map(|part| (*part).to_owned()).chain(inside);
        let path = path.collect::<Vec<_>>();
        let text = fs::read_to_string(&file).unwrap();
        let tree =
            syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let module = &path[parent.len()];
        let imported = imports.entry(module.clone()).or_default();
        for found in found(&tree, &path) {
            let is_inside = found.len() > parent.len()
                && parent.iter().zip(&found).all(|(one, two)| one == two);
            if is_inside && found[parent.len()] != *module {
                imported.insert(found[parent.len()].clone());
            }
        }
    }
    // A path may also name an item of the folder's own module, such as a type.
    let modules = imports.keys().cloned().collect::<BTreeSet<_>>();
    for imported in imports.values_mut() {
        imported.retain(|name| modules.contains(name));
    }
    imports
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The paths from the crate's root that a file names, in imports and elsewhere, tests left out.
fn found(tree: &syn::File, module: &[String]) -> BTreeSet<Vec<String>> {
    let mut finder = Finder {
        module: module.to_vec(),
        found: BTreeSet::new(),
    };
    finder.visit_file(tree);
    finder.found
}

struct Finder {
    module: Vec<String>,
    found: BTreeSet<Vec<String>>,
}

impl Finder {
    /// Adds a path as it is written, if it leads to something of this crate.
    fn add(&mut self, path: &[String]) {
        let mut from = self.module.clone();
        let mut rest = path.iter();
        let from = match path.first().map(String::as_str) {
            Some("crate") => {
                rest.next();
                Vec::new()
            }
            Some("super") => {
                while rest.as_slice().first().is_some_and(|part| part == "super") {
                    from.pop();
                    rest.next();
                }
                from
            }
            _ => return,
        };
        self.found
            .insert(from.into_iter().chain(rest.cloned()).collect());
    }

    fn add_tree(&mut self, tree: &syn::UseTree, path: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(part) => {
                path.push(part.ident.to_string());
                self.add_tree(&part.tree, path);
                path.pop();
            }
            syn::UseTree::Name(name) => {
                self.add(&[path.as_slice(), &[name.ident.to_string()]].concat())
            }
            syn::UseTree::Rename(name) => {
                self.add(&[path.as_slice(), &[name.ident.to_string()]].concat())
            }
            syn::UseTree::Glob(_) => self.add(path),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_tree(tree, path);
                }
            }
        }
    }
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&item.tree, &mut Vec::new());
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string());
        self.add(&parts.collect::<Vec<_>>());
        visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let is_test = item.attrs.iter().any(|attribute| {
            let list = attribute.meta.require_list();
            attribute.path().is_ident("cfg")
                && list.is_ok_and(|list| list.tokens.to_string().contains("test"))
        });
        if !is_test {
            self.module.push(item.ident.to_string());
            visit::visit_item_mod(self, item);
            self.module.pop();
        }
    }
}

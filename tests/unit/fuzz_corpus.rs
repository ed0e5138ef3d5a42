//! Replays the corpora of the fuzz targets, so that what a fuzzer found once stays found.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

#[test]
fn every_corpus_passes_its_target() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    for (name, target) in targets::ALL {
        let inputs = fs::read_dir(corpora.join(name));
        let inputs = inputs.unwrap_or_else(|error| panic!("the corpus of {name}: {error}"));
        let mut count = 0;
        for input in inputs {
            let path = input.unwrap().path();
            let data = fs::read(&path).unwrap();
            // Names the input that panics.
            eprintln!("{}", path.display());
            target(&data);
            count += 1;
        }
        assert!(count > 0, "the corpus of {name} is empty");
    }
}

#[test]
fn every_target_takes_any_beginning_of_its_corpus() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    for (name, target) in targets::ALL {
        for input in fs::read_dir(corpora.join(name)).unwrap() {
            let data = fs::read(input.unwrap().path()).unwrap();
            for end in 0..data.len().min(400) {
                target(&data[..end]);
            }
        }
    }
}

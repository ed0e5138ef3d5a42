//! The four kinds of patches, as far as agents, flannel and kubectl use them on the kinds served.

use serde_json::{Map, Value, json};

use super::store::Refused;

/// Lists of objects that a strategic patch merges by a key, on the kinds that are served.
const MERGED_BY: [(&str, &str); 3] = [
    ("conditions", "type"),
    ("addresses", "type"),
    ("taints", "key"),
];
/// Lists of plain values that a strategic patch unites.
const UNITED: [&str; 2] = ["finalizers", "podCIDRs"];

/// Applies a patch of the given media type.
///
/// # Errors
///
/// 415 for another media type, 400 for a body that is no such patch, 422 when it cannot be applied.
pub(super) fn apply(media_type: &str, object: &Value, patch: &[u8]) -> Result<Value, Refused> {
    let bad = |error: serde_json::Error| Refused::new(400, "BadRequest", error.to_string());
    let mut object = object.clone();
    match media_type {
        "application/json-patch+json" => {
            let patch: json_patch::Patch = serde_json::from_slice(patch).map_err(bad)?;
            json_patch::patch(&mut object, &patch)
                .map_err(|error| Refused::new(422, "Invalid", error.to_string()))?;
        }
        "application/merge-patch+json" => {
            let patch: Value = serde_json::from_slice(patch).map_err(bad)?;
            json_patch::merge(&mut object, &patch);
        }
        "application/strategic-merge-patch+json" => {
            let patch: Value = serde_json::from_slice(patch).map_err(bad)?;
            merge(&mut object, &patch);
        }
        // Ownership of fields is not kept: what one manager applies is set, and stays.
        "application/apply-patch+yaml" | "application/apply-patch+cbor" => {
            let patch: Value = serde_json::from_slice(patch).map_err(bad)?;
            merge(&mut object, &patch);
        }
        other => {
            let message = format!("the media type {other} is not that of a patch");
            return Err(Refused::new(415, "UnsupportedMediaType", message));
        }
    }
    Ok(object)
}

/// Merges as strategic patches do: null removes, known lists are merged, other lists replaced.
fn merge(target: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target
        .as_object_mut()
        .expect("it was made an object just now");
    for (field, value) in patch {
        if field.starts_with('$') {
            continue;
        }
        merge_field(target, field, value);
    }
}

fn merge_field(target: &mut Map<String, Value>, field: &str, value: &Value) {
    if value.is_null() {
        target.remove(field);
        return;
    }
    let key = MERGED_BY
        .iter()
        .find(|(list, _)| *list == field)
        .map(|(_, key)| *key);
    let here = target.entry(field).or_insert(Value::Null);
    match (value, here.as_array_mut()) {
        (Value::Array(items), Some(list)) if UNITED.contains(&field) => {
            for item in items {
                if !list.contains(item) {
                    list.push(item.clone());
                }
            }
        }
        (Value::Array(items), Some(list)) => match key {
            Some(key) => merge_list(list, items, key),
            None => *list = items.clone(),
        },
        _ => merge(here, value),
    }
}

fn merge_list(list: &mut Vec<Value>, items: &[Value], key: &str) {
    for item in items {
        let position = list.iter().position(|have| have[key] == item[key]);
        match (item["$patch"] == "delete", position) {
            (true, Some(at)) => drop(list.remove(at)),
            (true, None) => {}
            (false, Some(at)) => merge(&mut list[at], item),
            (false, None) => list.push(item.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strategic(object: &Value, patch: &Value) -> Value {
        apply(
            "application/strategic-merge-patch+json",
            object,
            patch.to_string().as_bytes(),
        )
        .unwrap()
    }

    #[test]
    fn null_removes_an_annotation_and_minds_no_missing_one() {
        let object = json!({"metadata": {"annotations": {"a": "1", "b": "2"}}});
        let patch = json!({"metadata": {"annotations": {"a": null, "c": null, "d": "4"}}});
        assert_eq!(
            strategic(&object, &patch),
            json!({"metadata": {"annotations": {"b": "2", "d": "4"}}})
        );
    }

    #[test]
    fn annotations_can_be_set_where_there_are_none() {
        let patch = json!({"metadata": {"annotations": {"a": "1"}}});
        assert_eq!(strategic(&json!({"metadata": {}}), &patch), patch);
    }

    #[test]
    fn conditions_are_merged_by_type() {
        let object = json!({"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "x"}]}});
        let patch = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "True"}]}});
        assert_eq!(
            strategic(&object, &patch)["status"]["conditions"],
            json!([{"type": "Ready", "status": "True", "reason": "x"}, {"type": "Other", "status": "True"}])
        );
    }
}

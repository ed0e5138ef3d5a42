//! A plain client of the Kubernetes API for tests: one request per connection, JSON in and out,
//! blocking, from inside a namespace. The product's own client is a different one, on purpose.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};

use crate::netns::within_path;

/// How long an answer may take; the API server under test is busy at most for a second or two.
const PATIENCE: Duration = Duration::from_secs(20);

/// Speaks to one API server, as one user.
#[derive(Clone, Debug)]
pub struct Client {
    namespace: PathBuf,
    server: SocketAddr,
    tls: Arc<ClientConfig>,
    token: String,
}

impl Client {
    /// A client that connects from the network namespace whose file is `namespace`.
    ///
    /// # Errors
    ///
    /// When the authority's certificate cannot be read.
    pub fn new(
        namespace: &Path,
        server: SocketAddr,
        authority: &Path,
        token: &str,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(authority)?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            namespace: namespace.to_owned(),
            server,
            tls: Arc::new(tls),
            token: token.to_owned(),
        })
    }

    /// The same server, as another user.
    #[must_use]
    pub fn with_token(&self, token: &str) -> Self {
        Self {
            token: token.to_owned(),
            ..self.clone()
        }
    }

    /// Reads an object or a list.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.expect_success("GET", path, "", None)
    }

    /// Creates an object in a collection.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn create(&self, collection: &str, object: &Value) -> anyhow::Result<Value> {
        self.expect_success("POST", collection, "application/json", Some(object))
    }

    /// Changes an object by a JSON merge patch (RFC 7386): `null` removes a field.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn merge(&self, path: &str, patch: &Value) -> anyhow::Result<Value> {
        self.expect_success("PATCH", path, "application/merge-patch+json", Some(patch))
    }

    /// Deletes an object.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.expect_success("DELETE", path, "", None)
    }

    /// Sets (or, with `None`, removes) annotations of a node.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn annotate(&self, node: &str, annotations: &[(&str, Option<&str>)]) -> anyhow::Result<()> {
        self.metadata(node, "annotations", annotations)
    }

    /// Sets (or, with `None`, removes) labels of a node.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn label(&self, node: &str, labels: &[(&str, Option<&str>)]) -> anyhow::Result<()> {
        self.metadata(node, "labels", labels)
    }

    /// Whether the server says that it is ready.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.request("GET", "/readyz", "", None)
            .is_ok_and(|(status, _)| status == 200)
    }

    /// Sends one request; the status code and the body (a string where it is not JSON).
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or does not speak HTTP.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<(u16, Value)> {
        let connect = || TcpStream::connect_timeout(&self.server, PATIENCE);
        let socket = within_path(&self.namespace, connect)?
            .with_context(|| format!("API server {}", self.server))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let name = ServerName::from(self.server.ip());
        let session = ClientConnection::new(Arc::clone(&self.tls), name)?;
        let mut stream = StreamOwned::new(session, socket);

        let body = body.map(Value::to_string).unwrap_or_default();
        // HTTP/1.0: the answer ends with the connection, so there is nothing to frame.
        let mut head = format!(
            "{method} {path} HTTP/1.0\r\nHost: {}\r\nAuthorization: Bearer {}\r\n\
             Accept: application/json\r\nUser-Agent: selvedge-lab\r\nContent-Length: {}\r\n",
            self.server,
            self.token,
            body.len()
        );
        if !body.is_empty() {
            head += &format!("Content-Type: {content_type}\r\n");
        }
        stream.write_all(format!("{head}\r\n{body}").as_bytes())?;
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            // Some servers end the connection without TLS's farewell.
            ensure!(
                error.kind() == std::io::ErrorKind::UnexpectedEof && !answer.is_empty(),
                "{method} {path}: {error}"
            );
        }
        parse(&answer).with_context(|| format!("{method} {path}"))
    }

    fn expect_success(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let (status, answer) = self.request(method, path, content_type, body)?;
        if !(200..300).contains(&status) {
            let message = answer["message"].as_str().unwrap_or_default();
            bail!("{method} {path}: {status} {message}");
        }
        Ok(answer)
    }

    fn metadata(
        &self,
        node: &str,
        field: &str,
        entries: &[(&str, Option<&str>)],
    ) -> anyhow::Result<()> {
        let entries: serde_json::Map<String, Value> = entries
            .iter()
            .map(|(key, value)| ((*key).to_owned(), json!(value)))
            .collect();
        let patch = json!({"metadata": {field: entries}});
        self.merge(&format!("/api/v1/nodes/{node}"), &patch)?;
        Ok(())
    }
}

/// Reads a page over plain HTTP from inside a namespace: the status code and the body.
///
/// # Errors
///
/// When no server listens there, or one that does not speak HTTP.
pub fn get_plain(
    namespace: &Path,
    server: SocketAddr,
    path: &str,
) -> anyhow::Result<(u16, String)> {
    let connect = || TcpStream::connect_timeout(&server, PATIENCE);
    let mut stream = within_path(namespace, connect)??;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (status, _) = parse(answer.as_bytes())?;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    Ok((status, body.to_owned()))
}

fn parse(answer: &[u8]) -> anyhow::Result<(u16, Value)> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .context("no HTTP status")?;
    let body = serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()));
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_status_and_its_body() {
        let json = parse(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\n{\"kind\":\"Node\"}").unwrap();
        let text = parse(b"HTTP/1.0 503 Down\r\n\r\nnot yet").unwrap();

        assert_eq!(json, (200, json!({"kind": "Node"})));
        assert_eq!(text, (503, json!("not yet")));
    }
}

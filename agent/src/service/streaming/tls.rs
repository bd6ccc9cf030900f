//! The certificate of the streaming server.

use std::{path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio_rustls::TlsAcceptor;

use super::StreamingError;
use crate::config::StreamingTlsConfig;

/// Reads certificate and key. No client has to show one: its token is worth more.
pub(super) fn acceptor(config: &StreamingTlsConfig) -> Result<TlsAcceptor, StreamingError> {
    let unusable = |path: &Path, detail: &dyn std::fmt::Display| StreamingError::Tls {
        path: path.to_owned(),
        detail: detail.to_string(),
    };
    let (certificate, key) = (&config.certificate, &config.key);
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unusable(certificate, &error))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, &error))?;
    let mut server = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| unusable(certificate, &error))?;
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}

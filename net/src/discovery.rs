//! Discovery of members on the local network by multicast DNS (RFC 6762, 6763).
//!
//! A node announces `_exo._udp` with its id and its cluster's fingerprint, and browses for others with the same
//! fingerprint. An announcement may be false: it only gives an address to dial, and the node there must authenticate.

use crate::identity::NodeId;
use mdns_sd::{ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use std::net::{SocketAddr, SocketAddrV6};
use tokio::sync::mpsc;

const SERVICE: &str = "_exo._udp.local.";

/// Why discovery did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiscoveryError {
    #[error("multicast DNS failed: {0}")]
    Mdns(#[from] mdns_sd::Error),
}

/// The running discovery: announces and browses until it is dropped.
pub(crate) struct Discovery {
    daemon: ServiceDaemon,
}

impl std::fmt::Debug for Discovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Discovery")
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        // Announces the departure; a daemon that has ended already needs no shutdown.
        let _ = self.daemon.shutdown();
    }
}

impl Discovery {
    /// Announces `own` at `address`, and sends the addresses of others to `found`. Called on a tokio runtime.
    pub(crate) fn start(
        own: NodeId,
        fingerprint: String,
        address: SocketAddr,
        found: mpsc::Sender<SocketAddr>,
    ) -> Result<Self, DiscoveryError> {
        let daemon = ServiceDaemon::new()?;
        let digits = own.to_string();
        let host = format!("exo-{}.local.", &digits[..16]);
        let properties = [("id", digits.as_str()), ("cluster", fingerprint.as_str())];
        let service = match address.ip() {
            ip if ip.is_unspecified() => {
                ServiceInfo::new(SERVICE, &digits[..16], &host, (), address.port(), &properties[..])?.enable_addr_auto()
            }
            ip => ServiceInfo::new(SERVICE, &digits[..16], &host, ip, address.port(), &properties[..])?,
        };
        daemon.register(service)?;
        let events = daemon.browse(SERVICE)?;
        tokio::spawn(async move {
            while let Ok(event) = events.recv_async().await {
                let ServiceEvent::ServiceResolved(service) = event else { continue };
                let has = |key: &str, value: &str| service.txt_properties.get_property_val_str(key) == Some(value);
                if !has("cluster", &fingerprint) || has("id", &digits) {
                    continue;
                }
                for ip in &service.addresses {
                    if found.send(with_scope(ip, service.port)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Self { daemon })
    }
}

/// The address to dial. A link-local address holds on one interface only, which its scope names.
fn with_scope(ip: &ScopedIp, port: u16) -> SocketAddr {
    match ip {
        ScopedIp::V6(ip) if ip.addr().is_unicast_link_local() => {
            SocketAddrV6::new(*ip.addr(), port, 0, ip.scope_id().index).into()
        }
        ip => SocketAddr::new(ip.to_ip_addr(), port),
    }
}

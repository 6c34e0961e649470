package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Certificater gives the current certificate of an identity; *Certificates is one.
type Certificater interface {
	Certificate(ctx context.Context, id mesh.Identity) (*Bundle, error)
}

// ServerTLS is TLS for connections to a workload: version 1.3, ALPN h2, its certificate and roots as they are when the
// handshake begins, and a client certificate that must lead to a root and carry a SPIFFE ID. Which identities
// of its trust domain may connect is not decided here (internal/authz). Sessions are not resumed: each handshake
// verifies its peer.
func ServerTLS(ctx context.Context, certificates Certificater, self mesh.Identity) *tls.Config {
	config := serverBase()
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		// The handshake's context ends with the connection, ctx with the listener: the wait for a first certificate
		// ends with either.
		wait, cancel := context.WithCancel(hello.Context())
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		b, err := certificates.Certificate(wait, self)
		if err != nil {
			return nil, err
		}
		current := serverBase()
		current.Certificates = []tls.Certificate{b.Certificate}
		current.VerifyConnection = func(s tls.ConnectionState) error {
			if err := verifyPeer(s, b.Roots, x509.ExtKeyUsageClientAuth, nil); err != nil {
				return err
			}
			return sameTrustDomain(s, self)
		}
		return current, nil
	}
	return config
}

// sameTrustDomain refuses a verified peer of another trust domain: where two share a root, that alone must not let the
// names of one pass in the other.
func sameTrustDomain(s tls.ConnectionState, self mesh.Identity) error {
	got, err := FromTLS(s)
	if err == nil && got.TrustDomain != self.TrustDomain {
		err = fmt.Errorf("peer %s is not of trust domain %s", got, self.TrustDomain)
	}
	return err
}

func serverBase() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		ClientAuth:             tls.RequireAnyClientCert, // verified in VerifyConnection
		SessionTicketsDisabled: true,
	}
}

// ClientTLS is TLS towards a peer that must have one of the expected identities: version 1.3, ALPN h2, no server name.
// With no identity expected, no peer is accepted.
func ClientTLS(b *Bundle, expected []mesh.Identity) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// The peer is known by its SPIFFE ID and not by a host name, so that VerifyConnection does the whole check.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(expected) == 0 {
				return errors.New("no identity expected of the peer: none is accepted")
			}
			return verifyPeer(s, b.Roots, x509.ExtKeyUsageServerAuth, expected)
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &b.Certificate, nil },
	}
}

// FromTLS is the peer's identity on a connection whose handshake, by ServerTLS or ClientTLS, has succeeded.
func FromTLS(s tls.ConnectionState) (mesh.Identity, error) {
	if len(s.PeerCertificates) == 0 {
		return mesh.Identity{}, errors.New("peer identity: no certificate")
	}
	return identityOf(s.PeerCertificates[0])
}

// MismatchError says that a peer's certificate is good but is not that of an expected identity.
type MismatchError struct {
	Got      mesh.Identity
	Expected []mesh.Identity
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("peer is %s, expected %v", e.Got, e.Expected)
}

// verifyPeer checks the peer's chain and identity; expected nil: any identity.
func verifyPeer(s tls.ConnectionState, roots *x509.CertPool, usage x509.ExtKeyUsage, expected []mesh.Identity) error {
	got, err := FromTLS(s)
	if err != nil {
		return err
	}
	if err := verify(s.PeerCertificates, roots, usage); err != nil {
		return fmt.Errorf("peer %s: %w", got, err)
	}
	if expected != nil && !slices.Contains(expected, got) {
		return &MismatchError{Got: got, Expected: expected}
	}
	return nil
}

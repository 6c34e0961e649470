// Package identity (protocols) is who a workload is and how it proves it: the certificate service
// istio.v1.auth.IstioCertificateService at both ends, a cache that keeps certificates fresh, and the TLS that uses
// them. Identities are SPIFFE IDs (https://spiffe.io/docs/latest/spiffe-specs/x509-svid/).
package identity

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Bundle is what a workload needs to speak TLS as itself. It never changes.
type Bundle struct {
	Identity mesh.Identity
	// Certificate is the leaf, what leads from it to a root, and the private key; Leaf is parsed.
	Certificate tls.Certificate
	// Roots are the certificates that peers are verified against.
	Roots     *x509.CertPool
	NotBefore time.Time
	NotAfter  time.Time
	// Chain is the leaf first and the root last, for people to look at.
	Chain []*x509.Certificate
}

// newBundle makes a bundle of a certificate service's reply, and checks that it is a valid one for id and key.
func newBundle(id mesh.Identity, key crypto.Signer, chainPEM []string) (*Bundle, error) {
	chain, roots, err := parseReply(chainPEM)
	if err != nil {
		return nil, err
	}
	leaf := chain[0]
	got, err := identityOf(leaf)
	if err != nil {
		return nil, err
	}
	if got != id {
		return nil, fmt.Errorf("certificate is for %s, not %s", got, id)
	}
	if public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(key.Public()) {
		return nil, errors.New("certificate is for another key")
	}
	b := &Bundle{
		Identity:    id,
		Certificate: tls.Certificate{PrivateKey: key, Leaf: leaf},
		Roots:       x509.NewCertPool(),
		NotBefore:   leaf.NotBefore,
		NotAfter:    leaf.NotAfter,
		Chain:       append(slices.Clip(chain), roots...),
	}
	for _, c := range roots {
		b.Roots.AddCert(c)
	}
	for _, c := range chain {
		b.Certificate.Certificate = append(b.Certificate.Certificate, c.Raw)
	}
	if err := verify(chain, b.Roots, x509.ExtKeyUsageClientAuth); err != nil {
		return nil, err
	}
	return b, nil
}

// parseReply splits a reply into the chain to present and the roots to trust. The last element of a reply holds the
// root, or several while roots are being changed; a reply of one element has the root at its end.
func parseReply(reply []string) (chain, roots []*x509.Certificate, err error) {
	var certificates []*x509.Certificate
	last := 0
	for _, element := range reply {
		last = len(certificates)
		parsed, err := parseCertificates(element)
		if err != nil {
			return nil, nil, err
		}
		certificates = append(certificates, parsed...)
	}
	if len(reply) == 1 {
		last = len(certificates) - 1
	}
	if last < 1 || last >= len(certificates) {
		return nil, nil, fmt.Errorf("reply of %d certificates: want a leaf and its root", len(certificates))
	}
	return certificates[:last], certificates[last:], nil
}

// parseCertificates reads PEM certificates in order.
func parseCertificates(text string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	rest := []byte(text)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out, nil
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %q where certificates are expected", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		out = append(out, c)
	}
}

// verify checks that chain[0] leads to one of the roots and may be used so, now.
func verify(chain []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage) error {
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return fmt.Errorf("verify certificate chain: %w", err)
	}
	return nil
}

// identityOf is the SPIFFE ID of a leaf certificate, in the form the mesh uses.
func identityOf(leaf *x509.Certificate) (mesh.Identity, error) {
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return mesh.Identity{}, fmt.Errorf("peer identity: %w", err)
	}
	return mesh.ParseIdentity(id.String())
}

package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// clockSkew is how much earlier than now a certificate begins, for peers whose clock is behind.
const clockSkew = 2 * time.Minute

// SelfSigned is a certificate authority in memory, with a root of its own: for a proxy that runs alone (FAKE_CA) and
// for tests. It is a Fetcher and an Authority.
type SelfSigned struct {
	key     crypto.Signer
	root    *x509.Certificate
	rootPEM string
	ttl     time.Duration
}

// NewSelfSigned makes a root, valid for ten years, whose certificates are valid for ttl (0: 24 hours).
func NewSelfSigned(trustDomain string, ttl time.Duration) (*SelfSigned, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make root key: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{Organization: []string{trustDomain}},
		NotBefore:    time.Now().Add(-clockSkew), NotAfter: time.Now().AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make root certificate: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make root certificate: %w", err)
	}
	return newSelfSigned(key, root, ttl), nil
}

func newSelfSigned(key crypto.Signer, root *x509.Certificate, ttl time.Duration) *SelfSigned {
	if ttl == 0 {
		ttl = 24 * time.Hour
	}
	return &SelfSigned{key: key, root: root, rootPEM: encodeCertificate(root.Raw), ttl: ttl}
}

// RootPEM is the root certificate.
func (s *SelfSigned) RootPEM() string { return s.rootPEM }

// Fetch makes a certificate for id.
func (s *SelfSigned) Fetch(_ context.Context, id mesh.Identity) (*Bundle, error) {
	key, text, err := newSigningRequest(id)
	if err != nil {
		return nil, fmt.Errorf("signing request for %s: %w", id, err)
	}
	csr, err := parseSigningRequest(text)
	if err != nil {
		return nil, err
	}
	chain, err := s.Sign(csr, id, s.ttl)
	if err != nil {
		return nil, err
	}
	return newBundle(id, key, chain)
}

// Sign signs the request's key for id.
func (s *SelfSigned) Sign(csr *x509.CertificateRequest, id mesh.Identity, ttl time.Duration) ([]string, error) {
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, fmt.Errorf("sign for %s: %w", id, err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, fmt.Errorf("sign for %s: %w", id, err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    now.Add(-clockSkew), NotAfter: now.Add(ttl),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{uri},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.root, csr.PublicKey, s.key)
	if err != nil {
		return nil, fmt.Errorf("sign for %s: %w", id, err)
	}
	return []string{encodeCertificate(der), s.rootPEM}, nil
}

func encodeCertificate(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

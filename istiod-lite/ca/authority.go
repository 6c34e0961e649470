// Package ca is the certificate authority of the mesh: the signing key and where it is kept, who may have which
// certificate, and the publishing of the root. The gRPC service around it is internal/identity's.
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	// clockSkew is how much earlier than now certificates begin, for peers whose clock is behind.
	clockSkew = 2 * time.Minute
	// rootLifetime is that of a self-made root.
	rootLifetime = 10 * 365 * 24 * time.Hour
	// servingLifetime is that of the control plane's own certificate, made anew at half of it.
	servingLifetime = 24 * time.Hour
)

// Authority signs certificates. It never changes once made, but for the serving certificate it renews.
type Authority struct {
	signer crypto.Signer
	cert   *x509.Certificate
	// chain are the certificates between a leaf and the root, PEM, the signer's first; empty when the root signs.
	chain []string
	roots string

	mu      sync.Mutex
	serving *tls.Certificate
}

// Material is the content of a CA Secret (Istio's key names) or of the same files in a directory.
type Material struct {
	Cert, Key, Chain, Root []byte
}

// Names of the material's parts.
const (
	CertFile  = "ca-cert.pem"
	KeyFile   = "ca-key.pem"
	ChainFile = "cert-chain.pem"
	RootFile  = "root-cert.pem"
)

// NewAuthority reads CA material and checks that it fits together.
func NewAuthority(m Material) (*Authority, error) {
	signer, err := parseKey(m.Key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", KeyFile, err)
	}
	certs, err := parseCertificates(m.Cert)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", CertFile, err)
	}
	a := &Authority{signer: signer, cert: certs[0]}
	if public, ok := a.cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(signer.Public()) {
		return nil, fmt.Errorf("%s is not the certificate of %s", CertFile, KeyFile)
	}
	if !a.cert.IsCA {
		return nil, fmt.Errorf("%s is not a CA certificate", CertFile)
	}
	if len(m.Root) == 0 {
		m.Root = m.Cert // a self-made root is both
	}
	roots, err := parseCertificates(m.Root)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", RootFile, err)
	}
	between := append([]*x509.Certificate(nil), certs...)
	if len(m.Chain) > 0 {
		chain, err := parseCertificates(m.Chain)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ChainFile, err)
		}
		between = append(between, chain...)
	}
	if err := a.link(between, roots); err != nil {
		return nil, err
	}
	return a, nil
}

// link checks that the signer leads to a root and keeps what a verifier needs in between.
func (a *Authority) link(between, roots []*x509.Certificate) error {
	pool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	known := map[string]bool{}
	for _, r := range roots {
		pool.AddCert(r)
		known[string(r.Raw)] = true
		a.roots += encodeCertificate(r.Raw)
	}
	for _, c := range between {
		intermediates.AddCert(c)
		if !known[string(c.Raw)] {
			known[string(c.Raw)] = true
			a.chain = append(a.chain, encodeCertificate(c.Raw))
		}
	}
	_, err := a.cert.Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return fmt.Errorf("%s does not lead to %s: %w", CertFile, RootFile, err)
	}
	return nil
}

// SelfMade makes the material of a new root.
func SelfMade(trustDomain string) (Material, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Material{}, fmt.Errorf("make root key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return Material{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Organization: []string{trustDomain}, CommonName: "Fairlead root"},
		NotBefore: time.Now().Add(-clockSkew), NotAfter: time.Now().Add(rootLifetime),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Material{}, fmt.Errorf("make root certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Material{}, fmt.Errorf("encode root key: %w", err)
	}
	cert := []byte(encodeCertificate(der))
	return Material{Cert: cert, Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), Root: cert}, nil
}

// Roots are the roots of the mesh, PEM.
func (a *Authority) Roots() string { return a.roots }

// Sign implements identity.Authority: a certificate for the request's key that names id and nothing else.
func (a *Authority) Sign(csr *x509.CertificateRequest, id mesh.Identity, ttl time.Duration) ([]string, error) {
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, fmt.Errorf("sign for %s: %w", id, err)
	}
	der, err := a.issue(&x509.Certificate{URIs: []*url.URL{uri}}, csr.PublicKey, ttl)
	if err != nil {
		return nil, fmt.Errorf("sign for %s: %w", id, err)
	}
	return append(append([]string{encodeCertificate(der)}, a.chain...), a.roots), nil
}

// issue signs a leaf; it ends no later than the signer's own certificate.
func (a *Authority) issue(template *x509.Certificate, public crypto.PublicKey, ttl time.Duration) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template.SerialNumber, template.NotBefore, template.NotAfter = serial, now.Add(-clockSkew), now.Add(ttl)
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	if !template.NotAfter.After(now) {
		return nil, fmt.Errorf("the CA certificate expired at %s", a.cert.NotAfter.Format(time.RFC3339))
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	return x509.CreateCertificate(rand.Reader, template, a.cert, public, a.signer)
}

// ServingTLS is the TLS of the control plane's own port: a certificate for its DNS names, made anew at half its life.
func (a *Authority) ServingTLS(names []string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			if c := a.serving; c != nil && time.Until(c.Leaf.NotAfter) > servingLifetime/2 {
				return c, nil
			}
			c, err := a.serve(names)
			if err != nil {
				return nil, err
			}
			a.serving = c
			return c, nil
		},
	}
}

func (a *Authority) serve(names []string) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make serving key: %w", err)
	}
	der, err := a.issue(&x509.Certificate{DNSNames: names}, key.Public(), servingLifetime)
	if err != nil {
		return nil, fmt.Errorf("sign serving certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign serving certificate: %w", err)
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	for _, text := range a.chain {
		block, _ := pem.Decode([]byte(text))
		c.Certificate = append(c.Certificate, block.Bytes)
	}
	return c, nil
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return serial, nil
}

func encodeCertificate(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("holds no PEM certificate")
	}
	return out, nil
}

func parseKey(text []byte) (crypto.Signer, error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case "EC PRIVATE KEY":
			return x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			return x509.ParsePKCS1PrivateKey(block.Bytes)
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			if signer, ok := key.(crypto.Signer); ok {
				return signer, nil
			}
			return nil, fmt.Errorf("key of type %T cannot sign", key)
		}
	}
	return nil, errors.New("holds no PEM private key")
}

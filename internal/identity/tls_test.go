package identity

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// fixed gives one bundle for every identity.
type fixed struct {
	bundle *Bundle
	err    error
}

func (f fixed) Certificate(context.Context, mesh.Identity) (*Bundle, error) { return f.bundle, f.err }

func authority(t *testing.T) *SelfSigned {
	t.Helper()
	s, err := NewSelfSigned("cluster.local", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func bundle(t *testing.T, ca *SelfSigned, id mesh.Identity) *Bundle {
	t.Helper()
	b, err := ca.Fetch(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// shake does a handshake over a pipe; the client's verdict is known once the server has answered it.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error, s, c *tls.Conn) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	s, c = tls.Server(a, server), tls.Client(b, client)
	done := make(chan error, 1)
	go func() {
		err := s.HandshakeContext(context.Background())
		if err != nil {
			_ = a.Close()
		} else {
			_, err = s.Write([]byte("x"))
		}
		done <- err
	}()
	clientErr = c.HandshakeContext(t.Context())
	if clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	} else {
		_ = b.Close()
	}
	return <-done, clientErr, s, c
}

func TestHandshake(t *testing.T) {
	ca := authority(t)
	server, client := bundle(t, ca, id("server")), bundle(t, ca, id("client"))
	serverErr, clientErr, s, c := shake(t, ServerTLS(t.Context(), fixed{bundle: server}, id("server")),
		ClientTLS(client, []mesh.Identity{id("other"), id("server")}))
	if serverErr != nil || clientErr != nil {
		t.Fatalf("server %v, client %v", serverErr, clientErr)
	}
	state := s.ConnectionState()
	if state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" || state.ServerName != "" {
		t.Errorf("version %x, protocol %q, server name %q: want TLS 1.3, h2 and none", state.Version, state.NegotiatedProtocol, state.ServerName)
	}
	if state.CurveID != tls.X25519MLKEM768 {
		t.Errorf("key exchange %v, want the post-quantum hybrid", state.CurveID)
	}
	if peer, err := FromTLS(state); err != nil || peer != id("client") {
		t.Errorf("server sees %v, %v", peer, err)
	}
	if peer, err := FromTLS(c.ConnectionState()); err != nil || peer != id("server") {
		t.Errorf("client sees %v, %v", peer, err)
	}
}

func TestHandshakeRefuses(t *testing.T) {
	ca, other := authority(t), authority(t)
	server, client := bundle(t, ca, id("server")), bundle(t, ca, id("client"))
	ctx := t.Context()
	expired, err := NewSelfSigned("cluster.local", -time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	stale := *client
	stale.Certificate = issue(t, expired, ca, id("client"))

	foreigner := *client
	foreigner.Certificate = issue(t, ca, ca, mesh.Identity{TrustDomain: "elsewhere.local", Namespace: "default", ServiceAccount: "client"})
	nameless := *client
	nameless.Certificate = withoutSPIFFE(t, client.Certificate)

	noCertificate := ClientTLS(client, []mesh.Identity{id("server")})
	noCertificate.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
	old := ClientTLS(client, []mesh.Identity{id("server")})
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12

	for _, tc := range []struct {
		name           string
		server, client *tls.Config
		want           string
	}{
		{"wrong server identity", ServerTLS(ctx, fixed{bundle: server}, id("server")), ClientTLS(client, []mesh.Identity{id("other")}), "peer is spiffe://cluster.local/ns/default/sa/server"},
		{"nothing expected", ServerTLS(ctx, fixed{bundle: server}, id("server")), ClientTLS(client, nil), "none is accepted"},
		{"server of another root", ServerTLS(ctx, fixed{bundle: bundle(t, other, id("server"))}, id("server")), ClientTLS(client, []mesh.Identity{id("server")}), "verify certificate chain"},
		{"client of another root", ServerTLS(ctx, fixed{bundle: server}, id("server")), ClientTLS(mixed(server, bundle(t, other, id("client"))), []mesh.Identity{id("server")}), "verify certificate chain"},
		{"client without certificate", ServerTLS(ctx, fixed{bundle: server}, id("server")), noCertificate, "didn't provide a certificate"},
		{"expired client", ServerTLS(ctx, fixed{bundle: server}, id("server")), ClientTLS(&stale, []mesh.Identity{id("server")}), "expired"},
		{"client of another trust domain", ServerTLS(ctx, fixed{bundle: server}, id("server")), ClientTLS(&foreigner, []mesh.Identity{id("server")}), "not of trust domain cluster.local"},
		{"client without a SPIFFE ID", ServerTLS(ctx, fixed{bundle: server}, id("server")), ClientTLS(&nameless, []mesh.Identity{id("server")}), "no URI SAN"},
		{"TLS 1.2", ServerTLS(ctx, fixed{bundle: server}, id("server")), old, "protocol version"},
		{"no certificate yet", ServerTLS(ctx, fixed{err: errors.New("not issued")}, id("server")), ClientTLS(client, []mesh.Identity{id("server")}), "not issued"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			serverErr, clientErr, _, _ := shake(t, tc.server, tc.client)
			if clientErr == nil && serverErr == nil {
				t.Fatal("the handshake succeeded")
			}
			if all := errors.Join(serverErr, clientErr).Error(); !strings.Contains(all, tc.want) {
				t.Errorf("errors %q, want one with %q", all, tc.want)
			}
		})
	}
}

// mixed trusts as one bundle and shows the certificate of another.
func mixed(trust, show *Bundle) *Bundle {
	out := *show
	out.Roots = trust.Roots
	return &out
}

// withoutSPIFFE is a certificate with the key of another that names a host in its SAN and no workload.
func withoutSPIFFE(t *testing.T, c tls.Certificate) tls.Certificate {
	t.Helper()
	key := c.PrivateKey.(crypto.Signer)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"host"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// issue makes a certificate with the lifetime of one authority and the root of another.
func issue(t *testing.T, lifetime, root *SelfSigned, id mesh.Identity) tls.Certificate {
	t.Helper()
	key, text, err := newSigningRequest(id)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := parseSigningRequest(text)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := root.Sign(csr, id, lifetime.ttl)
	if err != nil {
		t.Fatal(err)
	}
	certificates, err := parseCertificates(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{certificates[0].Raw}, PrivateKey: key}
}

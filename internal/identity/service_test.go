package identity

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	ca "istio.io/api/security/v1alpha1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// accounts authenticates by a table of tokens; nodeRule lets the node proxy have the identities of its pods.
type accounts map[string]Caller

func (a accounts) Authenticate(ctx context.Context) (Caller, error) {
	token, err := BearerToken(ctx)
	if err != nil {
		return Caller{}, err
	}
	caller, ok := a[token]
	if !ok {
		return Caller{}, errors.New("unknown token")
	}
	return caller, nil
}

type nodeRule struct{ pods []mesh.Identity }

func (n nodeRule) Authorize(_ context.Context, caller Caller, wanted mesh.Identity) error {
	if caller.Identity.ServiceAccount != "ztunnel" {
		return errors.New("not a node proxy")
	}
	for _, pod := range n.pods {
		if pod == wanted {
			return nil
		}
	}
	return errors.New("no such pod on the caller's node")
}

// swapped signs for an identity that nobody asked for.
type swapped struct{ *SelfSigned }

func (s swapped) Sign(csr *x509.CertificateRequest, _ mesh.Identity, ttl time.Duration) ([]string, error) {
	return s.SelfSigned.Sign(csr, id("somebody-else"), ttl)
}

func ztunnel() mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "istio-system", ServiceAccount: "ztunnel"}
}

func serve(t *testing.T, authority Authority) func(context.Context) (*grpc.ClientConn, error) {
	t.Helper()
	listener := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	ca.RegisterIstioCertificateServiceServer(server, NewServer(ServerConfig{
		Authenticator: accounts{"zt": {Identity: ztunnel()}, "client": {Identity: id("client")}},
		Authorizer:    nodeRule{[]mesh.Identity{id("client"), id("server")}},
		Authority:     authority, MaxTTL: 2 * time.Hour, Log: zap.NewNop(),
	}))
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return func(context.Context) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	}
}

func client(t *testing.T, dial func(context.Context) (*grpc.ClientConn, error), token string, self mesh.Identity) *CA {
	t.Helper()
	c := NewCA(ClientConfig{Dial: dial, Token: func() (string, error) { return token, nil }, ClusterID: "c1", Self: self})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestFetch(t *testing.T) {
	root := authority(t)
	dial := serve(t, root)
	for _, tc := range []struct {
		name   string
		token  string
		self   mesh.Identity
		wanted mesh.Identity
	}{
		{"own", "client", id("client"), id("client")},
		{"a pod's", "zt", ztunnel(), id("server")},
		{"the node proxy's own", "zt", ztunnel(), ztunnel()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, err := client(t, dial, tc.token, tc.self).Fetch(t.Context(), tc.wanted)
			if err != nil {
				t.Fatal(err)
			}
			if b.Identity != tc.wanted || len(b.Chain) != 2 || len(b.Certificate.Certificate) != 1 {
				t.Errorf("bundle %+v", b)
			}
			if life := time.Until(b.NotAfter); life > 2*time.Hour || life < 119*time.Minute {
				t.Errorf("valid for %v, want the server's most, 2 h", life)
			}
		})
	}
}

func TestFetchRefused(t *testing.T) {
	dial := serve(t, authority(t))
	for _, tc := range []struct {
		name   string
		token  string
		self   mesh.Identity
		wanted mesh.Identity
		want   codes.Code
	}{
		{"nobody known", "forged", ztunnel(), id("server"), codes.Unauthenticated},
		{"another's, by a pod", "client", id("client"), id("server"), codes.PermissionDenied},
		{"a pod of another node", "zt", ztunnel(), id("elsewhere"), codes.PermissionDenied},
		{"another's, said to be one's own", "client", id("server"), id("server"), codes.OK},
		{"not an identity", "zt", ztunnel(), mesh.Identity{TrustDomain: "td"}, codes.InvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := client(t, dial, tc.token, tc.self).Fetch(t.Context(), tc.wanted)
			if err == nil {
				t.Fatal("a certificate was issued")
			}
			if tc.want == codes.OK {
				// The service signs for who the caller is, and the client does not take that for what it asked for.
				if !strings.Contains(err.Error(), "certificate is for "+id("client").String()) {
					t.Errorf("error %v", err)
				}
				return
			}
			if got := status.Code(errors.Unwrap(err)); got != tc.want {
				t.Errorf("code %v (%v), want %v", got, err, tc.want)
			}
		})
	}
}

func TestFetchChecksTheReply(t *testing.T) {
	c := client(t, serve(t, swapped{authority(t)}), "client", id("client"))
	if _, err := c.Fetch(t.Context(), id("client")); err == nil || !strings.Contains(err.Error(), "certificate is for spiffe://cluster.local/ns/default/sa/somebody-else") {
		t.Errorf("error %v, want one about the wrong identity", err)
	}
}

func TestParseSigningRequest(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, weak)
	if err != nil {
		t.Fatal(err)
	}
	_, good, err := newSigningRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(good))
	block.Bytes[len(block.Bytes)-1] ^= 1
	for _, tc := range []struct{ name, in, want string }{
		{"no PEM", "hello", "not a PEM certificate request"},
		{"a certificate", authority(t).RootPEM(), "not a PEM certificate request"},
		{"a weak key", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), "1024 bits"},
		{"not signed by its key", string(pem.EncodeToMemory(block)), "signing request"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := parseSigningRequest(tc.in); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
	if _, err := parseSigningRequest(good); err != nil {
		t.Errorf("a good one: %v", err)
	}
}

// TestTwoRoots: while roots are changed, the reply's last element holds both, and peers of either are trusted.
func TestTwoRoots(t *testing.T) {
	oldRoot, newRoot := authority(t), authority(t)
	key, text, err := newSigningRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := parseSigningRequest(text)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := newRoot.Sign(csr, id("a"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	both, err := newBundle(id("a"), key, []string{chain[0], chain[1] + oldRoot.RootPEM()})
	if err != nil {
		t.Fatal(err)
	}
	oldPeer := bundle(t, oldRoot, id("old"))
	if err := verify(oldPeer.Chain[:1], both.Roots, x509.ExtKeyUsageServerAuth); err != nil {
		t.Errorf("peer of the old root: %v", err)
	}
	single, err := newBundle(id("a"), key, []string{chain[0] + chain[1]})
	if err != nil || len(single.Chain) != 2 {
		t.Errorf("a reply of one element: %v, %v", single, err)
	}
	if _, err := newBundle(id("a"), key, []string{chain[0]}); err == nil {
		t.Error("a reply without a root was taken")
	}
}

package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	ca "istio.io/api/security/v1alpha1"
)

// serveTLS serves certificates on loopback with a server certificate of root for istiod.istio-system.svc.
func serveTLS(t *testing.T, root *SelfSigned) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{"istiod.istio-system.svc"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}, root.root, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})))
	ca.RegisterIstioCertificateServiceServer(server, NewServer(ServerConfig{
		Authenticator: accounts{"client": {Identity: id("client")}}, Authority: root, Log: zap.NewNop(),
	}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

func TestDialControlPlane(t *testing.T) {
	root, other := authority(t), authority(t)
	dir := t.TempDir()
	plane := ControlPlane{
		Address:  "https://" + serveTLS(t, root),
		RootFile: filepath.Join(dir, "root-cert.pem"), TokenFile: filepath.Join(dir, "token"),
		ServerName: "istiod.istio-system.svc",
	}
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fetch := func(p ControlPlane) error {
		c := NewCA(ClientConfig{Dial: p.Dial, Self: id("client")})
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := c.Fetch(ctx, id("client"))
		return err
	}
	refused := func(what string, p ControlPlane, want string) {
		t.Helper()
		if err := fetch(p); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", what, err, want)
		}
	}

	refused("no roots", plane, "control plane roots")
	write(plane.RootFile, other.RootPEM())
	refused("other roots", plane, "unknown authority")
	write(plane.RootFile, root.RootPEM())
	refused("no token", plane, "service-account token")
	write(plane.TokenFile, "client\n")
	if err := fetch(plane); err != nil {
		t.Errorf("good roots and token: %v", err)
	}
	wrongName := plane
	wrongName.ServerName = "elsewhere.svc"
	refused("another name", wrongName, "not elsewhere.svc")
	refused("no scheme", ControlPlane{Address: "istiod:15012"}, "want https://host:port")
	refused("unknown scheme", ControlPlane{Address: "ftp://istiod:15012"}, "unknown scheme")
}

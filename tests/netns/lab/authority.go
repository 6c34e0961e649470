package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	ca "istio.io/api/security/v1alpha1"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// AuthorityAddress is where the certificate service of ServeAuthority listens, in a proxy's own namespace.
var AuthorityAddress = netip.MustParseAddrPort("127.0.0.1:15012")

// ServeAuthority serves certificates to a proxy, for those that make none themselves, and writes the root by which the
// service is known to rootFile.
func ServeAuthority(ns *os.File, authority identity.Authority, rootFile string) (stop func() error, err error) {
	certificate, rootPEM, err := selfSignedServer(AuthorityAddress.Addr())
	if err != nil {
		return nil, fmt.Errorf("certificate service: %w", err)
	}
	if err := os.WriteFile(rootFile, rootPEM, 0o644); err != nil {
		return nil, err
	}
	listener, err := netns.Listen(ns, "tcp4", AuthorityAddress, 0, false)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&certificate)))
	ca.RegisterIstioCertificateServiceServer(server, identity.NewServer(identity.ServerConfig{
		Authenticator: anybody{}, Authorizer: anybody{}, Authority: authority, Log: zap.NewNop(),
	}))
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	return func() error {
		server.Stop()
		return <-served
	}, nil
}

// anybody lets everyone have every certificate: the proxy is the only one in its namespace.
type anybody struct{}

func (anybody) Authenticate(context.Context) (identity.Caller, error) {
	return identity.Caller{Identity: mesh.Identity{TrustDomain: mesh.DefaultTrustDomain, Namespace: "istio-system", ServiceAccount: "ztunnel"}}, nil
}

func (anybody) Authorize(context.Context, identity.Caller, mesh.Identity) error { return nil }

// selfSignedServer makes the certificate of a server that is known by its address.
func selfSignedServer(addr netip.Addr) (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{addr.AsSlice()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

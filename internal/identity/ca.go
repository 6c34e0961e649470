package identity

// The client's steps (server.go is the other end):
//  1. Make a key and a signing request.
//  2. Send it with the caller's own token and, where it is another's certificate, whose.
//  3. Check the reply: leads to its root, is for that identity and that key.
//
// Next: server.go.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"
	ca "istio.io/api/security/v1alpha1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	// impersonatedIdentity is the request's metadata field that names whose certificate a node proxy asks for.
	impersonatedIdentity = "ImpersonatedIdentity"
	// clusterIDHeader tells the certificate service which cluster's API server vouches for the token.
	clusterIDHeader = "clusterid"
	// fetchTimeout bounds one request; retries are Certificates' doing.
	fetchTimeout = 10 * time.Second
)

// Fetcher gets a new certificate for an identity.
type Fetcher interface {
	Fetch(ctx context.Context, id mesh.Identity) (*Bundle, error)
}

// ClientConfig is what a CA client needs.
type ClientConfig struct {
	// Dial gives a connection to the certificate service. It is kept, and gRPC restores it by itself.
	Dial func(ctx context.Context) (*grpc.ClientConn, error)
	// Token gives the caller's service-account token as it is now; nil where Dial's connection carries it.
	Token     func() (string, error)
	ClusterID string
	// Self is the caller's own identity: for it no impersonation is asked for.
	Self mesh.Identity
	// TTL asked for; 0 means 24 hours.
	TTL time.Duration
}

// CA is a client of the certificate service.
type CA struct {
	cfg ClientConfig

	mu   sync.Mutex
	conn *grpc.ClientConn
}

// NewCA makes a client; it dials at the first Fetch.
func NewCA(cfg ClientConfig) *CA {
	if cfg.TTL == 0 {
		cfg.TTL = 24 * time.Hour
	}
	return &CA{cfg: cfg}
}

// Close closes the connection.
func (c *CA) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	return err
}

// Fetch gets a new certificate for id, with a new key.
func (c *CA) Fetch(ctx context.Context, id mesh.Identity) (*Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	key, request, err := newSigningRequest(id)
	if err != nil {
		return nil, fmt.Errorf("signing request for %s: %w", id, err)
	}
	message := &ca.IstioCertificateRequest{Csr: request, ValidityDuration: int64(c.cfg.TTL / time.Second)}
	if id != c.cfg.Self {
		message.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{
			impersonatedIdentity: structpb.NewStringValue(id.String()),
		}}
	}
	ctx, err = c.outgoing(ctx)
	if err != nil {
		return nil, fmt.Errorf("fetch certificate for %s: %w", id, err)
	}
	conn, err := c.connection(ctx)
	if err != nil {
		return nil, fmt.Errorf("fetch certificate for %s: dial: %w", id, err)
	}
	reply, err := ca.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, message)
	if err != nil {
		return nil, fmt.Errorf("fetch certificate for %s: %w", id, err)
	}
	b, err := newBundle(id, key, reply.GetCertChain())
	if err != nil {
		return nil, fmt.Errorf("certificate service's reply for %s: %w", id, err)
	}
	return b, nil
}

// outgoing adds the token and the cluster to the request's headers.
func (c *CA) outgoing(ctx context.Context) (context.Context, error) {
	if c.cfg.ClusterID != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, clusterIDHeader, c.cfg.ClusterID)
	}
	if c.cfg.Token == nil {
		return ctx, nil
	}
	token, err := c.cfg.Token()
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	return metadata.AppendToOutgoingContext(ctx, authorizationHeader, bearer+token), nil
}

func (c *CA) connection(ctx context.Context) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		return c.conn, nil
	}
	conn, err := c.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	c.conn = conn
	return conn, nil
}

// newSigningRequest makes an ECDSA P-256 key and a PEM signing request for id.
func newSigningRequest(id mesh.Identity) (*ecdsa.PrivateKey, string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", err
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, "", err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{uri}}, key)
	if err != nil {
		return nil, "", err
	}
	return key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

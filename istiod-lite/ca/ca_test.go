package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/metadata"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

var web = mesh.Identity{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: "web"}

// signFor asks for a certificate and verifies the reply as a peer would.
func signFor(t *testing.T, a *Authority, id mesh.Identity, ttl time.Duration) []*x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// What the request asks for by itself (names, a CA) must not be granted.
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"istiod.istio-system.svc"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	reply, err := a.Sign(csr, id, ttl)
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, text := range reply {
		certs, err := parseCertificates([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, certs...)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(a.Roots())) {
		t.Fatal("no roots")
	}
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("reply does not verify: %v", err)
	}
	return chain
}

func TestSignGrantsTheIdentityAndNothingElse(t *testing.T) {
	m, err := SelfMade("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	a, err := NewAuthority(m)
	if err != nil {
		t.Fatal(err)
	}
	chain := signFor(t, a, web, time.Hour)
	leaf := chain[0]
	if len(chain) != 2 || len(leaf.URIs) != 1 || leaf.URIs[0].String() != web.String() || len(leaf.DNSNames) != 0 || leaf.IsCA || leaf.Subject.CommonName != "" {
		t.Errorf("chain of %d; leaf: URIs %v, names %v, CA %t, subject %s", len(chain), leaf.URIs, leaf.DNSNames, leaf.IsCA, leaf.Subject)
	}
	if left := time.Until(leaf.NotAfter); left > time.Hour || left < 59*time.Minute {
		t.Errorf("valid for %s, want an hour", left)
	}
}

// pluggedIn is an intermediate below a root, as a company's CA would issue it, expiring soon.
func pluggedIn(t *testing.T, isCA bool) Material {
	t.Helper()
	rootMaterial, err := SelfMade("company")
	if err != nil {
		t.Fatal(err)
	}
	root, err := NewAuthority(rootMaterial)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "intermediate"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: isCA, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, root.cert, key.Public(), root.signer)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := []byte(encodeCertificate(der))
	return Material{Cert: cert, Chain: cert, Root: rootMaterial.Cert, Key: pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})}
}

func TestPluggedInAuthority(t *testing.T) {
	a, err := NewAuthority(pluggedIn(t, true))
	if err != nil {
		t.Fatal(err)
	}
	chain := signFor(t, a, web, 24*time.Hour)
	if len(chain) != 3 || chain[1].Subject.CommonName != "intermediate" {
		t.Errorf("chain of %d, want leaf, intermediate, root", len(chain))
	}
	if chain[0].NotAfter.After(chain[1].NotAfter) {
		t.Error("the leaf outlives its signer")
	}
}

func TestMaterialThatDoesNotFitIsRefused(t *testing.T) {
	good, other := pluggedIn(t, true), pluggedIn(t, true)
	for name, m := range map[string]Material{
		"key of another": {Cert: good.Cert, Key: other.Key, Root: good.Root},
		"other root":     {Cert: good.Cert, Key: good.Key, Root: other.Root},
		"not a CA":       pluggedIn(t, false),
		"no key":         {Cert: good.Cert, Root: good.Root},
		"no certificate": {Key: good.Key, Root: good.Root},
	} {
		if _, err := NewAuthority(m); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestServingTLS(t *testing.T) {
	a, err := NewAuthority(pluggedIn(t, true))
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", a.ServingTLS([]string{"istiod.istio-system.svc"}))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.(*tls.Conn).Handshake() // the client says whether it went well
			c.Close()
		}
	}()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(a.Roots()))
	for name, ok := range map[string]bool{"istiod.istio-system.svc": true, "web.default.svc": false} {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		client := tls.Client(c, &tls.Config{RootCAs: roots, ServerName: name, NextProtos: []string{"h2"}})
		if err := client.Handshake(); (err == nil) != ok {
			t.Errorf("as %s: %v", name, err)
		}
		c.Close()
	}
}

func TestDirectoryKeepsTheRoot(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	first, err := FromDirectory(dir, "cluster.local", zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	second, err := FromDirectory(dir, "cluster.local", zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	written, err := os.ReadFile(filepath.Join(dir, RootFile))
	if err != nil || string(written) != first.Roots() || first.Roots() != second.Roots() {
		t.Errorf("the root changed with a restart, or is not in %s (%v)", RootFile, err)
	}
	if info, err := os.Stat(filepath.Join(dir, KeyFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key is for its owner only: %v %v", info.Mode(), err)
	}
}

func TestClusterKeepsTheRoot(t *testing.T) {
	ctx := context.Background()
	client := fake.NewClientset()
	first, err := FromCluster(ctx, client, "istio-system", "cluster.local", zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	second, err := FromCluster(ctx, client, "istio-system", "cluster.local", zap.NewNop())
	if err != nil || first.Roots() != second.Roots() {
		t.Errorf("the root changed with a restart (%v)", err)
	}
	m := pluggedIn(t, true)
	_, err = client.CoreV1().Secrets("istio-system").Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: PluggedInSecret},
		Data:       map[string][]byte{CertFile: m.Cert, KeyFile: m.Key, ChainFile: m.Chain, RootFile: m.Root},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	third, err := FromCluster(ctx, client, "istio-system", "cluster.local", zap.NewNop())
	if err != nil || third.Roots() != string(m.Root) {
		t.Errorf("the plugged-in CA is not used (%v)", err)
	}
}

// nodePods is a ca.Pods.
type nodePods []*corev1.Pod

func (n nodePods) Pod(namespace, name string) (*corev1.Pod, bool) {
	for _, p := range n {
		if p.Namespace == namespace && p.Name == name {
			return p, true
		}
	}
	return nil, false
}

func (n nodePods) PodsOn(node string) []*corev1.Pod {
	var out []*corev1.Pod
	for _, p := range n {
		if p.Spec.NodeName == node {
			out = append(out, p)
		}
	}
	return out
}

func pod(namespace, name, account, node string, phase corev1.PodPhase) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("uid-" + name)},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: account}, Status: corev1.PodStatus{Phase: phase},
	}
}

func TestNodeCheck(t *testing.T) {
	check := NodeCheck{TrustDomain: "cluster.local", NodeAccounts: []string{"istio-system/ztunnel"}, Pods: nodePods{
		pod("istio-system", "zt1", "ztunnel", "one", corev1.PodRunning),
		pod("istio-system", "zt-unscheduled", "ztunnel", "", corev1.PodPending),
		pod("default", "web", "web", "one", corev1.PodPending),
		pod("default", "noaccount", "", "one", corev1.PodRunning),
		pod("default", "job", "job", "one", corev1.PodSucceeded),
		pod("default", "db", "db", "two", corev1.PodRunning),
	}}
	ztunnel := identity.Caller{Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "istio-system", ServiceAccount: "ztunnel"},
		PodName: "zt1", PodUID: "uid-zt1", Node: "one"}
	with := func(f func(*identity.Caller)) identity.Caller { c := ztunnel; f(&c); return c }
	wanted := func(account string) mesh.Identity {
		return mesh.Identity{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: account}
	}
	for _, tt := range []struct {
		name   string
		caller identity.Caller
		wanted mesh.Identity
		err    string
	}{
		{name: "pod of the node", caller: ztunnel, wanted: wanted("web")},
		{name: "no account named", caller: ztunnel, wanted: wanted("default")},
		{name: "token that does not say its node", caller: with(func(c *identity.Caller) { c.Node = "" }), wanted: wanted("web")},
		{name: "pod of another node", caller: ztunnel, wanted: wanted("db"), err: "no pod with service account default/db runs on node one"},
		{name: "finished pod", caller: ztunnel, wanted: wanted("job"), err: "no pod with service account default/job"},
		{name: "other trust domain", caller: ztunnel, wanted: mesh.Identity{TrustDomain: "evil", Namespace: "default", ServiceAccount: "web"}, err: "trust domain"},
		{name: "not a node proxy", caller: with(func(c *identity.Caller) { c.Identity.ServiceAccount = "web" }), wanted: wanted("web"), err: "is not a node proxy's account"},
		{name: "ztunnel of another namespace", caller: with(func(c *identity.Caller) { c.Identity.Namespace = "default" }), wanted: wanted("web"), err: "is not a node proxy's account"},
		{name: "unbound token", caller: with(func(c *identity.Caller) { c.PodName = "" }), wanted: wanted("web"), err: "not bound to a pod"},
		{name: "pod gone", caller: with(func(c *identity.Caller) { c.PodName = "zt9" }), wanted: wanted("web"), err: "does not exist"},
		{name: "namesake", caller: with(func(c *identity.Caller) { c.PodUID = "uid-old" }), wanted: wanted("web"), err: "is another one now"},
		{name: "token of another node", caller: with(func(c *identity.Caller) { c.Node = "two" }), wanted: wanted("web"), err: "is not on node"},
		{name: "nowhere", caller: with(func(c *identity.Caller) { c.PodName, c.PodUID, c.Node = "zt-unscheduled", "", "" }), wanted: wanted("web"), err: "is not on node"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := check.Authorize(context.Background(), tt.caller, tt.wanted)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %v, want %q", err, tt.err)
			}
		})
	}
}

func withToken(token string) context.Context {
	return metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+token))
}

func TestTokenReview(t *testing.T) {
	client := fake.NewClientset()
	reviews := 0
	client.PrependReactor("create", "tokenreviews", func(action k8stesting.Action) (bool, runtime.Object, error) {
		reviews++
		r := action.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		r.Status = authenticationv1.TokenReviewStatus{Authenticated: r.Spec.Token != "bad", Audiences: r.Spec.Audiences, User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:istio-system:ztunnel", Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": {"zt1"}, "authentication.kubernetes.io/pod-uid": {"u"}, "authentication.kubernetes.io/node-name": {"one"}}}}
		switch r.Spec.Token {
		case "user":
			r.Status.User.Username = "admin"
		case "audience":
			r.Status.Audiences = []string{"other"}
		}
		return true, r, nil
	})
	review := NewTokenReview(client, "cluster.local")
	want := identity.Caller{Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "istio-system", ServiceAccount: "ztunnel"}, PodName: "zt1", PodUID: "u", Node: "one"}
	for range 2 {
		if got, err := review.Authenticate(withToken("good")); err != nil || got != want {
			t.Errorf("got %+v, %v", got, err)
		}
	}
	if reviews != 1 {
		t.Errorf("%d reviews of one token within its lifetime", reviews)
	}
	for _, token := range []string{"bad", "user", "audience"} {
		if caller, err := review.Authenticate(withToken(token)); err == nil {
			t.Errorf("%s: accepted as %+v", token, caller)
		}
	}
	if _, err := review.Authenticate(context.Background()); err == nil {
		t.Error("accepted without a token")
	}
}

func TestTokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(path, []byte("# who\n\nabc,istio-system/ztunnel,zt1\nwrong,noslash,x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := TokenFile{Path: path, TrustDomain: "td"}
	want := identity.Caller{Identity: mesh.Identity{TrustDomain: "td", Namespace: "istio-system", ServiceAccount: "ztunnel"}, PodName: "zt1"}
	if got, err := f.Authenticate(withToken("abc")); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, token := range []string{"ab", "wrong", "# who"} {
		if _, err := f.Authenticate(withToken(token)); err == nil {
			t.Errorf("token %q accepted", token)
		}
	}
}

func TestRootIsPublishedAndRepaired(t *testing.T) {
	client := fake.NewClientset()
	p := NewRootPublisher(client, "the root", zap.NewNop())
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return client.CoreV1().ConfigMaps("").List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return client.CoreV1().ConfigMaps("").Watch(ctx, o)
		},
	}
	done := make(chan error, 1)
	go func() { done <- p.run(ctx, cache.ToListWatcherWithWatchListSemantics(lw, client)) }()
	now := metav1.Now()
	p.Namespace(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "going", DeletionTimestamp: &now}})
	p.Namespace(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	published := func() *corev1.ConfigMap {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if c, err := client.CoreV1().ConfigMaps("default").Get(ctx, RootConfigMap, metav1.GetOptions{}); err == nil && c.Data[RootFile] == "the root" {
				return c
			}
		}
		t.Fatal("not published within 5 s")
		return nil
	}
	c := published().DeepCopy()
	c.Data = map[string]string{RootFile: "another"}
	if _, err := client.CoreV1().ConfigMaps("default").Update(ctx, c, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	published()
	if err := client.CoreV1().ConfigMaps("default").Delete(ctx, RootConfigMap, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	published()
	if _, err := client.CoreV1().ConfigMaps("going").Get(ctx, RootConfigMap, metav1.GetOptions{}); err == nil {
		t.Error("published in a namespace on its way out")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

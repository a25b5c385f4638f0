#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
#define F(n) static double f##n(const double*a,int m){double s=n;for(int i=0;i<m;i++){switch((i*n)%7){case 0:s+=sin(a[i]*n);break;case 1:s-=a[i]*a[(i+n)%m];break;case 2:if(s>1e6)s/=3;else s*=1.01;break;case 3:{char b[64];snprintf(b,64,"%g",s);s+=strlen(b);break;}case 4:for(int j=0;j<n%5;j++)s+=a[(i*j)%m];break;default:s+=n/(a[i]+1);}}return s;}
#define G(n) F(n##0) F(n##1) F(n##2) F(n##3) F(n##4) F(n##5) F(n##6) F(n##7) F(n##8) F(n##9)
G(1) G(2) G(3) G(4) G(5) G(6) G(7) G(8) G(9) G(10) G(11) G(12) G(13) G(14) G(15) G(16) G(17) G(18) G(19) G(20) G(21) G(22) G(23) G(24) G(25) G(26) G(27) G(28) G(29) G(30)
#define C(n) s+=f##n(a,m);
#define D(n) C(n##0) C(n##1) C(n##2) C(n##3) C(n##4) C(n##5) C(n##6) C(n##7) C(n##8) C(n##9)
double all(const double*a,int m){double s=0;D(1) D(2) D(3) D(4) D(5) D(6) D(7) D(8) D(9) D(10) D(11) D(12) D(13) D(14) D(15) D(16) D(17) D(18) D(19) D(20) D(21) D(22) D(23) D(24) D(25) D(26) D(27) D(28) D(29) D(30) return s;}
